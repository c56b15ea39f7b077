"""What `--speculative-config` asks for, checked as `engine.speculation` of a file is."""

from __future__ import annotations

from pydantic import ValidationError

from pdlab.core.types import UsageError
from pdlab.experiment.cluster import SpeculationSpec
from pdlab.experiment.speculative_config import EXAMPLE, KEYS, plain


def parsed(text: str) -> SpeculationSpec:
    """Raises UsageError after the option's name."""
    try:
        return SpeculationSpec.model_validate(plain(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = next((theirs for theirs, ours in KEYS.items() if first["loc"] and ours == first["loc"][0]), "")
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"--speculative-config: {f'{where}: ' if where else ''}{said}; give it like {EXAMPLE}") from None
    except UsageError as error:
        raise UsageError(f"--speculative-config: {error}") from None
