"""Models by their id on the Hugging Face hub, `owner/name` or `owner/name@revision`: only weights without code and texts are fetched."""

import re
from pathlib import Path

from dmsec_jax.checkpoints.diffusers import INDEX, TOKENIZER_FILES, XL
from dmsec_jax.core.checks import fail

ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,100}))?")
BESIDES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "learned_embeds.safetensors",
)
"""What an adapter's repository holds."""


def is_id(name: str | Path) -> bool:
    """Whether this can only be an id: nothing of that name is here, nor the folder that it would be in."""
    return ID.fullmatch(str(name)) is not None and not Path(name).exists() and not Path(name).parent.exists()


def fetch(name: str | Path, variant: str | None = None) -> Path:
    """The folder of a model in the hub's cache, which is downloaded where it is not there already.

    Only safetensors, JSON and the tokenizers' texts are fetched, and of the weights those of one variant. Without a network, or with
    HF_HUB_OFFLINE=1, what the cache holds is taken.

    Args:
        name: "owner/name", or "owner/name@revision".
        variant: "fp16" for the weight files with that infix; None for those without, or the fp16 ones if there are no others.

    Raises:
        FileNotFoundError: if there is no such model, or it cannot be reached and is not in the cache.
        ValueError: on an id that is none.
    """
    match = ID.fullmatch(str(name))
    if match is None:
        raise fail("model", "owner/name or owner/name@revision", repr(str(name)), "correct the id")
    repo, revision = match.groups()
    for infix in (variant,) if variant else (None, "fp16"):
        folder = _snapshot(repo, revision, patterns(infix))
        parts = [part for part in XL if (folder / part / "config.json").is_file()]
        if all(any((folder / part).glob("*.safetensors")) for part in parts):
            break
    return folder


def patterns(variant: str | None) -> list[str]:
    """What is fetched."""
    infix = f".{variant}" if variant else ""
    wanted = [INDEX, "scheduler/scheduler_config.json", *BESIDES]
    wanted += [f"{folder}/{file}" for folder in ("tokenizer", "tokenizer_2") for file in TOKENIZER_FILES]
    for name, component in XL.items():
        weights = f"{name}/{component.stem}"
        wanted += [f"{name}/config.json", f"{weights}{infix}.safetensors", f"{weights}{infix}-*-of-*.safetensors"]
        wanted += [f"{weights}.safetensors.index{infix}.json"]
    return wanted


def _snapshot(repo: str, revision: str | None, wanted: list[str]) -> Path:
    import huggingface_hub  # here, since reading local files does not need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise fail("model", "owner/name", repr(repo), "correct the id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"neither a file or folder {repo} here, nor a model of that id on the hub or in its cache: {reason}"
        ) from error
