"""What an embedder has done so far."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class EmbedStats:
    """What an embedder has done so far."""

    num_texts: int = 0
    num_distinct: int = 0
    num_packs: int = 0
    num_tokens: int = 0
    """Tokens of the distinct texts."""
    num_computed: int = 0
    """Tokens that went through the model: padding counts, and what texts of a pack begin with in
    common counts once a pack."""
    embed_s: float = 0.0
    """Seconds inside ``embed``."""
