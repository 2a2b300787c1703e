"""Where a model computes: in the actors of a job, or on a server of the same model."""

from dataclasses import dataclass
from typing import Literal

from qbatch.errors import ConfigError
from qbatch.models.server import ServerConfig
from qbatch.pipelines.unit_job import UnitJobConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig(UnitJobConfig):
    """The flags that say so."""

    engine: Literal["local", "http"] = "local"
    """local computes in the actors; http asks an OpenAI-compatible server of the same model."""
    endpoint: str | None = None
    """Of the server, such as http://host:8000/v1."""
    served_model: str | None = None
    """What the server calls the model; None is --model as given."""
    concurrency: int = 32
    """Requests that each actor has on their way."""
    timeout_s: float = 120.0
    """For one answer of the server."""
    max_retries: int = 8
    """How often a request to the server is sent again."""

    def server_of(self, model: str, dtype: str) -> ServerConfig | None:
        """Return the server that computes, None for the actors themselves.

        Args:
            model: As the job calls it.
            dtype: In which the server is said to compute.

        Raises:
            ConfigError: The settings do not go together.
        """
        if self.engine == "local":
            if self.endpoint is not None:
                raise ConfigError(
                    f"endpoint is {self.endpoint!r} with --engine=local; give --engine=http to use "
                    "it, or leave it out"
                )
            return None
        if self.endpoint is None:
            raise ConfigError("--engine=http needs --endpoint, such as http://host:8000/v1")
        if dtype == "auto":
            raise ConfigError(
                "--dtype=auto with --engine=http; name the dtype in which the server computes, "
                "since it is part of what its output is known by"
            )
        return ServerConfig(
            endpoint=self.endpoint,
            model=self.served_model or model,
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
        )

    def check_foretold(self, tokens_per_s: float | None) -> None:
        """Raise ConfigError if a dry run, given no speed, would have to measure a server."""
        if self.engine == "http" and tokens_per_s is None:
            raise ConfigError(
                "--dry-run cannot measure a server; give --tokens-per-s, what it does for one actor"
            )
