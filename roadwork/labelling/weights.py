"""Models by name: a local folder, the hub, or one clear sentence about why neither works."""

from __future__ import annotations

import os
from pathlib import Path

from roadwork.errors import UserError

SAM_URLS = {
    "vit_b": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
    "vit_l": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
    "vit_h": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
}
"""Published SAM 1 checkpoints of segment_anything's registry."""


def model_folder(name: str) -> str:
    """A local folder for a model of transformers, fetched from the hub where `name` is no folder.

    Every file is fetched or found in the local cache before a network is built, so that one process of many fails at
    the same place as all others.

    Raises:
        UserError: nothing there, gated, or unreachable: names the model, the licence page and the local-folder option.
    """
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise UserError(f"masks.model {name}: no config.json in this folder; give the folder of a saved model")
        return name
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local:
        raise UserError(f"masks.model {name}: no such folder; give a saved model's folder or a hub name as OWNER/NAME")
    return _from_hub(name)


def _from_hub(name: str) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.txt", "*.safetensors"]
    try:
        found = snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        if any(Path(found).glob("*.safetensors")) and Path(found, "config.json").is_file():
            return found
    except (LocalEntryNotFoundError, ValueError, OSError):
        pass  # not in the cache: ask the hub
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise _missing(name, "it is not in the local cache and HF_HUB_OFFLINE is set")
    try:
        HfApi().auth_check(name)  # answers at once; a download would retry an unreachable hub for minutes
        return snapshot_download(name, allow_patterns=patterns)
    except GatedRepoError:
        raise _missing(name, "it is gated and this account has not accepted its licence") from None
    except RepositoryNotFoundError:
        raise _missing(name, "the hub knows no such model, or shows it only to a logged-in account") from None
    except Exception as error:  # the hub's client raises kinds of four libraries; all mean that it cannot be had
        raise _missing(name, f"the hub cannot be reached ({' '.join(str(error).split())[:80]})") from None


def _missing(name: str, reason: str) -> UserError:
    return UserError(
        f"masks.model {name}: {reason}; accept the licence at https://huggingface.co/{name} and log in with "
        "`hf auth login`, or give --masks.model a local folder with its files, or random-tiny to try without weights"
    )


def sam_checkpoint(name: str) -> Path:
    """A SAM 1 checkpoint: a file, or one of segment_anything's registry, downloaded once.

    Raises:
        UserError: no such file, or the download failed.
    """
    if name not in SAM_URLS:
        if not Path(name).is_file():
            raise UserError(
                f"masks.model: no SAM checkpoint at {name}; give DETECTOR+SAM where SAM is a .pth file or one of "
                f"{', '.join(SAM_URLS)}"
            )
        return Path(name)
    import torch

    url = SAM_URLS[name]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise UserError(
                f"masks.model: SAM {name} cannot be fetched from {url} ({' '.join(str(error).split())[:80]}); put "
                "that file on this machine and give --masks.model DETECTOR+FILE.pth, or random-tiny to try it"
            ) from None
    return path
