"""Who may ask: a neutral list of people, for when the user has none."""

from importlib.resources import files


def default_personas() -> list[str]:
    """Return twenty people of different walks of life, in English."""
    text = files("qbatch.training").joinpath("personas.txt").read_text(encoding="utf-8")
    return text.splitlines()
