"""Sources of rows: a bed, a local file or directory, or the hub."""

from __future__ import annotations

import csv
import itertools
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vdr_cli.beds import gym
from vdr_cli.beds.registry import BEDS, SPLITS
from vdr_cli.config import DataConfig
from vdr_cli.config.paths import checked_path, looks_like_path
from vdr_cli.data.compression import ENDINGS, data_suffix
from vdr_cli.data.files import COMPRESSED, SUFFIXES, Row, Table, check_column, csv_delimiter, read_file, row_of
from vdr_cli.errors import ConfigError, DataError, MachineError
from vdr_cli.models.hub import settle_on_cache_if_away
from vdr_cli.system.text import reason

logger = logging.getLogger(__name__)

Role = Literal["train", "eval"]


def check_data(name: str, key: str, column: str | None = None) -> None:
    """Data that look like a local file or directory must be there and be of a kind that can be read.

    column: of a file, must be there too.
    """
    path = checked_path(name, key)
    if gym.is_suite(name):
        gym.suite_of(name, {}, key)
        return
    if name in BEDS or not (looks_like_path(name) or data_suffix(path) in SUFFIXES):
        return
    if not path.exists():
        raise ConfigError(f"{key} {name}: no such file or directory; give {', '.join(BEDS)}, a local file or a hub id")
    if not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{key} {name}: neither a file nor a directory; save the data in a file and name it")
    if path.is_file() and data_suffix(path) not in SUFFIXES:
        raise ConfigError(f"{key} {name}: a file must end in one of {', '.join(SUFFIXES)}, {COMPRESSED}")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{key} {name}: the file is empty")
    if not os.access(path, os.R_OK):
        raise MachineError(f"{key} {name}: no permission to read it")
    if path.is_file() and column is not None:
        check_column(path, column)


def open_table(cfg: DataConfig, role: Role) -> Table:
    """The rows of `data.name`/`data.split` (train) or `data.eval_name`/`data.eval_split` (eval).

    Raises ConfigError when there is no such data or split, DataError when the data cannot be read or are empty.
    """
    own_place = role == "eval" and cfg.eval_name is not None
    name = cfg.eval_name if own_place and cfg.eval_name is not None else cfg.name
    split = cfg.split if role == "train" else cfg.eval_split
    split_key = "data.split" if role == "train" else "data.eval_split"
    check_data(name, "data.eval_name" if own_place else "data.name")
    if not own_place or name == cfg.name:
        check_subset(cfg)
    path = Path(name)
    if name in BEDS:
        table = _bed(name, split, split_key)
    elif gym.is_suite(name):
        table = _suite(cfg, name, split, split_key)
    elif has_no_splits(path):
        _check_split_left_out(name, split, split_key, role, own_place)
        table = read_file(path) if path.is_file() else _dataset_table(name, _saved(path))
    elif path.is_dir():
        table = _directory(name, cfg.subset if name == cfg.name else None, split, split_key)
    else:
        table = _hub(name, cfg.subset if name == cfg.name else None, split, split_key)
    if len(table) == 0:
        raise DataError(f"{table.name}: no rows")
    return table


def _bed(name: str, split: str, split_key: str) -> Table:
    if split not in SPLITS:
        raise ConfigError(f"{split_key} {split}: the splits of {name} are {', '.join(SPLITS)}")
    rows: list[Row] = BEDS[name].rows(split)
    return Table(f"{name}[{split}]", rows, tuple(rows[0]) if rows else ())


def check_options(cfg: DataConfig) -> None:
    """data.options fit the data that are named. Raises ConfigError."""
    suites = [name for name in dict.fromkeys((cfg.name, cfg.eval_name)) if name is not None and gym.is_suite(name)]
    if cfg.options and not suites:
        raise ConfigError(
            f"data.options are settings of reasoning_gym tasks, and data.name {cfg.name} has none; remove them"
        )
    used = {task.name for name in suites for task in gym.suite_of(name, cfg.options).tasks}
    unused = [name for name in cfg.options if gym.is_task(name) and name not in used] if suites else []
    if unused:
        raise ConfigError(f"data.options.{unused[0]}: no such task in {' or '.join(suites)}; remove it")


def check_subset(cfg: DataConfig) -> None:
    """data.subset is given only for data that can have subsets. Raises ConfigError."""
    path = Path(cfg.name)
    one_kind = cfg.name in BEDS or gym.is_suite(cfg.name) or has_no_splits(path) or _has_saved_splits(path)
    if cfg.subset is not None and one_kind:
        raise ConfigError(f"data.subset {cfg.subset}: {cfg.name} has no subsets; leave data.subset out")


def _suite(cfg: DataConfig, name: str, split: str, split_key: str) -> Table:
    if split not in SPLITS:
        raise ConfigError(f"{split_key} {split}: the splits of {name} are {', '.join(SPLITS)}")
    suite = gym.suite_of(name, cfg.options)
    if split == "train":
        rows = gym.train_rows(suite)
    else:
        held_out = gym.held_out_rows(suite, gym.suite_of(cfg.name, cfg.options) if gym.is_suite(cfg.name) else suite)
        rows = held_out.rows
        if held_out.in_training or held_out.repeated:
            logger.warning(
                "%s: %d held-out problems occur in training and %d twice, and were left out; %d are left",
                name, held_out.in_training, held_out.repeated, len(rows),
            )  # fmt: skip
    return Table(f"{name}[{split}]", rows, tuple(rows[0]))


def has_no_splits(path: Path) -> bool:
    """True for a file, and for a directory to which `datasets` saved one data set rather than a dictionary of them."""
    return path.is_file() or (path / "state.json").is_file()


def _has_saved_splits(path: Path) -> bool:
    """True for a directory to which `datasets` saved a dictionary of data sets."""
    return (path / "dataset_dict.json").is_file()


def _check_split_left_out(name: str, split: str, split_key: str, role: Role, own_place: bool) -> None:
    """Data without splits: no name but the default or `train` (as `datasets` names a whole file) can be meant.

    Nor can training data be held out.
    """
    if role == "eval" and not own_place:
        raise ConfigError(f"data.name {name} has no splits; give data.eval_name, the held-out data")
    if split not in ("train", DataConfig.model_fields["split" if role == "train" else "eval_split"].default):
        raise ConfigError(f"{split_key} {split}: {name} has no splits; leave {split_key} out")


def _directory(name: str, subset: str | None, split: str, split_key: str) -> Table:
    """A directory that `datasets` saved, or one with a file a split (train.jsonl, test.parquet, ...)."""
    path = Path(name)
    if _has_saved_splits(path):
        loaded = _saved(path)
        if split not in loaded:
            raise ConfigError(f"{split_key} {split}: the splits of {name} are {', '.join(loaded)}")
        return _dataset_table(f"{name}[{split}]", loaded[split])
    for suffix, ending in itertools.product(SUFFIXES, ENDINGS) if subset is None else ():
        file = path / f"{split}{suffix}{ending}"
        if file.is_file():
            return read_file(file)
    return _hub(name, subset, split, split_key)


def _saved(path: Path) -> Any:
    """The dataset that save_to_disk wrote. Raises DataError for a directory that is not whole."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except Exception as error:  # what Arrow, JSON and the file system raise
        raise DataError(f"{path}: cannot be read as a saved data set ({reason(error)}); save it again") from None


def _hub(name: str, subset: str | None, split: str, split_key: str) -> Table:
    """A data set by hub id, or a directory in a layout that `datasets` knows."""
    if not Path(name).exists():
        settle_on_cache_if_away()
    from datasets import load_dataset

    try:
        loaded: Any = load_dataset(name, subset, split=split)
        options = _text_options(name, subset, loaded)
        if options:
            loaded = load_dataset(name, subset, split=split, **options)
    except ValueError as error:
        why = reason(error)
        if "split" in why.lower():
            raise ConfigError(f"{split_key} {split}: {name} has no such split ({why})") from None
        if "config" in why.lower():
            raise ConfigError(f"data.subset {subset}: {why}") from None
        raise ConfigError(f"data.name {name}: cannot be loaded ({why})") from None
    except Exception as error:
        # `datasets` raises what its file systems, parsers and HTTP clients raise; all mean that there are no data.
        raise ConfigError(
            f"data.name {name}: neither a local file or directory nor loadable from the hub ({reason(error)})"
        ) from None
    return _dataset_table(f"{name}[{split}]", loaded)


def _text_options(name: str, subset: str | None, loaded: Any) -> dict[str, Any]:
    """Options under which `datasets` gives what a CSV or JSON file says; none where it does so anyway.

    Left alone, it makes 7 of a CSV cell 007, and a datetime of a JSON text "2024-01-01". A data set whose card says the
    types keeps them. loaded: the data under guessed types.
    """
    from datasets import load_dataset_builder
    from datasets.load import dataset_module_factory
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    builder = load_dataset_builder(name, subset)
    if not isinstance(builder, Csv | Json):
        return {}
    cards = dataset_module_factory(name).dataset_infos or {}
    if any(card.features is not None for card in cards.values()):
        return {}
    return _csv_options(loaded.column_names) if isinstance(builder, Csv) else _json_options(loaded)


def _csv_options(columns: list[str]) -> dict[str, Any]:
    from datasets import Features, Value

    mark = csv_delimiter(columns[0]) if len(columns) == 1 else ","
    names = next(csv.reader([columns[0]], delimiter=mark)) if len(columns) == 1 else columns
    return {"features": Features(dict.fromkeys(names, Value("string"))), "keep_default_na": False, "sep": mark}


def _json_options(loaded: Any) -> dict[str, Any]:
    """JSON has no times: whatever was taken for one is text. And 42 beside 0.5 is a whole number, not 42.0.

    No options before the version of `datasets` that has Json.
    """
    import datasets

    as_json = getattr(datasets, "Json", None)
    if as_json is None:
        return {}

    def kept(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: kept(inner) for name, inner in feature.items()}
        if isinstance(feature, datasets.List | datasets.LargeList):
            return type(feature)(kept(feature.feature))
        is_time = isinstance(feature, datasets.Value) and feature.dtype.startswith("timestamp")
        return as_json() if is_time else feature

    features = dict(loaded.features)
    whole = {name: as_json() for name in features if _has_whole_floats(loaded, name)}
    changed = {name: kept(feature) for name, feature in features.items()} | whole
    return {} if changed == features else {"features": datasets.Features(changed)}


def _has_whole_floats(loaded: Any, name: str) -> bool:
    from pyarrow import compute, types

    column = loaded.data.column(name)
    return types.is_floating(column.type) and bool(compute.any(compute.equal(compute.floor(column), column)).as_py())


class UndecodedRows:
    """A `datasets` data set whose images, audio, video and unreadable cells matter only to whoever asks for them."""

    def __init__(self, dataset: Any, media: Sequence[str]) -> None:
        """media: the columns that need decoding."""
        self._dataset, self._media = dataset, media
        self._plain = dataset.remove_columns(list(media)) if media else dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> Row:
        names = self._plain.column_names
        row = row_of(names, lambda: dict(self._plain[index]), partial(self._cell, index)) if names else {}
        if not self._media:
            return row
        from vdr_cli.samples import Undecoded  # brings torch, which the checks before the start do without

        return row | {name: Undecoded(partial(self._cell, index, name)) for name in self._media}

    def select_columns(self, columns: list[str]) -> Any:
        """The same rows with only these columns."""
        if set(columns) & set(self._media):
            return [{name: row[name] for name in columns} for row in (self[index] for index in range(len(self)))]
        return self._plain.select_columns(columns)

    def _cell(self, index: int, name: str) -> Any:
        """One cell, decoded."""
        return self._dataset.select_columns([name])[index][name]


def _dataset_table(name: str, loaded: Any) -> Table:
    loaded = loaded.with_format(None)  # one that was saved with it makes tensors of lists, and hides columns
    columns = tuple(loaded.column_names)
    media = [column for column in columns if _is_media(loaded.features[column])]
    return Table(name, UndecodedRows(loaded, media), columns)


def _is_media(feature: Any) -> bool:
    """True for a column with images, audio or the like, which `datasets` decodes from bytes; it also decodes Json."""
    from datasets.features.features import require_decoding

    inner = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    if any(each is not None for each in inner):
        return any(map(_is_media, inner))
    return type(feature).__name__ != "Json" and require_decoding(feature)
