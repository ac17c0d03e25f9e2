"""Where things live; nothing else computes a path.

Entry points: `notebooks`, `params`, `output_dir`, `checkpoint_dir`, `figure_dir`, `cache_dir`, `data_dir`, `portable`. The environment moves four of
them: HILDA_OUTPUTS and HILDA_FIGURES (roots of results), HILDA_CACHE (downloads), HILDA_DATA (a folder of own data).
"""

import os
from pathlib import Path

from platformdirs import user_cache_path

ROOT = Path(__file__).resolve().parents[1]


def _from_environment(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value).expanduser().resolve() if value else None


def notebooks() -> Path:
    """Folder of the paired notebooks."""
    return ROOT / "notebooks"


def params(profile: str | None = None, notebook: str | None = None) -> Path:
    """The YAML file of a notebook in a profile; the profile's folder, or the folder of all profiles, where less is given."""
    folder = ROOT / "params"
    folder = folder / profile if profile else folder
    return folder / f"{notebook}.yaml" if notebook else folder


def outputs_root() -> Path:
    return _from_environment("HILDA_OUTPUTS") or ROOT / "outputs"


def figures_root() -> Path:
    return _from_environment("HILDA_FIGURES") or ROOT / "figures"


def _seeded(root: Path, profile: str, seed: int) -> Path:
    return root / profile / f"seed{seed}" if seed else root / profile


def _folder(path: Path, create: bool) -> Path:
    if create:
        path.mkdir(parents=True, exist_ok=True)
    return path


def output_dir(profile: str, notebook: str, seed: int = 0, *, create: bool = True) -> Path:
    """Folder of what a notebook writes: outputs/<profile>/<notebook>, with seed<k> between the two for k > 0."""
    return _folder(_seeded(outputs_root(), profile, seed) / notebook, create)


def checkpoint_dir(profile: str, notebook: str, seed: int = 0, *, create: bool = True) -> Path:
    """Folder of a notebook's weights and resumable state, the part of its output that is not committed."""
    return _folder(output_dir(profile, notebook, seed, create=create) / "checkpoints", create)


def figure_dir(profile: str, seed: int = 0, *, create: bool = True) -> Path:
    """Folder of figures with the tables they were drawn from."""
    return _folder(_seeded(figures_root(), profile, seed), create)


def cache_dir(*, create: bool = True) -> Path:
    """Folder of downloads: HILDA_CACHE, else the platform's own cache folder."""
    return _folder(_from_environment("HILDA_CACHE") or user_cache_path("hilda", appauthor=False), create)


def portable(name: str, folder: Path) -> str:
    """`name` as a path from `folder`, where it is a folder and both lie in the outputs: such a pair may be moved together; any other name as it is."""
    root, place = outputs_root(), Path(name).resolve()
    inside = Path(name).is_dir() and place.is_relative_to(root) and folder.is_relative_to(root)
    return Path(os.path.relpath(place, folder)).as_posix() if inside else name


def data_dir() -> Path | None:
    """Folder of the user's own data (HILDA_DATA), or None."""
    return _from_environment("HILDA_DATA")


MORE_SPACE = ("the disk is full; free some space, or set HILDA_OUTPUTS, HILDA_FIGURES or HILDA_CACHE to a folder with more, and give the same "
              "command again: what was finished is kept")


def disk_full(message: str) -> bool:
    """Whether an error message says that a disk has no space left: in the words of the system, of safetensors or of torch.save."""
    return any(words in message for words in ("No space left on device", "Disk quota exceeded", "os error 28", "not enough space on the disk",
                                              "PytorchStreamWriter failed writing file"))
