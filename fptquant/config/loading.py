"""Configs from YAML files with ``key=value`` overrides; all mistakes are reported at once, with their paths."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fptquant.config.contradictions import find_contradictions
from fptquant.config.schema import Config
from fptquant.config.without_effect import find_without_effect
from fptquant.errors import UserError

Problem = tuple[str, str]
"""YAML path and message."""

_Schema = TypeVar("_Schema", bound=BaseModel)


_TABLE_KEYS = {"methods", "settings"}
"""What the file of a table has, and that of a method has not."""


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error and 1e-3 is a number (YAML 1.1: the last key, and a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def config_folders() -> list[Path]:
    """Folders that may hold the shipped configs: beside the modules when installed, at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / "configs", package.parent / "configs") if (folder / "methods").is_dir()]


def shipped_configs(kind: Literal["methods", "tables"] | None = None) -> dict[str, Path]:
    """Every shipped config, or those of a kind, by its short name (its file name without ``.yaml``)."""
    found: dict[str, Path] = {}
    for folder in config_folders():
        for path in (path for part in ("methods/*.yaml", "tables/*.yaml", "*.yaml") for path in sorted(folder.glob(part))):
            if kind is None or path.parent.name == kind:
                found.setdefault(path.stem, path)
    return found


def find_config(path_or_name: str | Path, kind: Literal["methods", "tables"] | None = None) -> Path:
    """The file that a path or a short name means; ``kind`` is what a message offers instead.

    A path that exists wins; ``configs/methods/rtn.yaml`` is also found, from any folder, in the shipped copy, and
    ``rtn`` is enough for that.

    Raises:
        UserError: if there is no such file; names what is nearest.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    for folder in config_folders():
        if not path.is_absolute() and parts and (folder / Path(*parts)).is_file():
            return folder / Path(*parts)
    if str(path_or_name) in (every := shipped_configs()):
        return every[str(path_or_name)]
    shipped = shipped_configs(kind)
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"there is no file {str(path_or_name)!r}{hint} fptquant ls names the shipped configs")
    raise UserError(f"there is no config {str(path_or_name)!r}{hint} Give a YAML file, or one of: {', '.join(shipped)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: if the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold keys and values (name: ..., model: ...), not {type(data).__name__}")
    return data


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, put upon that of the config which its key ``extends`` names, if it has one.

    Keys inside a key are merged; anything else, null included, takes the place of what was there. The name is not handed on.

    Raises:
        UserError: as `read_yaml` and `find_config`; if a config extends itself by a chain of others.
    """
    return _read_recipe(path, ())


def _read_recipe(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    data = read_yaml(path)
    extended = data.pop("extends", None)
    if extended is None:
        return data
    if not isinstance(extended, str):
        raise UserError(f"{path}: extends is {extended!r}; write the name of a method or the path of a YAML file")
    chain = (*above, path.resolve())
    parent = path.parent / extended if (path.parent / extended).is_file() else find_config(extended)
    if parent.resolve() in chain:
        raise UserError(f"{path} extends {extended}, which extends it in turn; leave out one of the two")
    base = _read_recipe(parent, chain)
    base.pop("name", None)
    return _merged(base, data)


def _merged(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``extra`` put in, key by key; a label replaces what labels decide, as in an override."""
    for key, value in extra.items():
        if key == "quantization" and (label := value if isinstance(value, str) else _get(value, "label")) is not None:
            _set(base, [key], label)
            value = {} if isinstance(value, str) else value
        there = base.get(key)
        base[key] = _merged(there, value) if isinstance(there, dict) and isinstance(value, dict) else value
    return base


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else None


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``data`` in which every ``a.b=value`` is set; values are parsed as YAML.

    ``quantization=LABEL`` replaces what a label decides (bits, static or dynamic, groups) and leaves the method's own
    choices (how ranges are set, sites, kept tokens) as they are.

    Raises:
        UserError: names every override that is not of the form ``key=value`` or whose value is not YAML.

    >>> apply_overrides({"seed": 0}, ["seed=3", "local.lr=1e-3"])
    {'seed': 3, 'local': {'lr': 0.001}}
    """
    result, problems = _apply_overrides(data, overrides)
    if problems:
        raise _problems_error("the command line", problems)
    return result


def _apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> tuple[dict[str, Any], list[Problem]]:
    result: dict[str, Any] = _copy(data)
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            problems.append((override, "is not of the form key=value, for example quantization.weight.bits=3"))
            continue
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            problems.append((override, f"the value {text!r} is not valid YAML; put text with special characters in quotes"))
            continue
        try:
            _set(result, keys, value)
        except UserError as error:
            problems.append((key, str(error)))
    return result, problems


def _copy(data: Any) -> Any:
    return {key: _copy(value) for key, value in data.items()} if isinstance(data, Mapping) else data


_LABEL_KEYS = {
    "weight": ("bits", "granularity", "group_size"),
    "activation": ("bits", "dynamic"),
    "kv_cache": ("bits", "dynamic"),
}
"""What a label decides in each part of ``quantization``."""


def _drop_granularity(settings: dict[str, Any], label: str) -> None:
    """A label decides how a token's own ranges are shared; a method's static groups stay for static labels."""
    if "-dynamic" in label or settings.get("granularity") == "per_token":
        settings.pop("granularity", None)
        settings.pop("group_size", None)


def _set(data: dict[str, Any], keys: list[str], value: Any) -> None:
    if keys in (["quantization"], ["quantization", "label"]) and isinstance(value, str):
        existing = data.get("quantization")
        parts = existing if isinstance(existing, dict) else {}
        for part, decided in _LABEL_KEYS.items():
            for key in decided if isinstance(parts.get(part), dict) else ():
                parts[part].pop(key, None)
            if part != "weight" and isinstance(parts.get(part), dict):
                _drop_granularity(parts[part], value)
        data["quantization"] = {**parts, "label": value}
        return
    if keys[0] == "quantization" and isinstance(data.get("quantization"), str):
        data["quantization"] = {"label": data["quantization"]}
    for index, key in enumerate(keys[:-1]):
        below = data.setdefault(key, {})
        if below is None or isinstance(below, bool):
            below = data[key] = {}
        if not isinstance(below, dict):
            raise UserError(f"{'.'.join(keys[: index + 1])} is {below!r} and has no keys below it")
        data = below
    data[keys[-1]] = value


def load_config(path_or_name: str | Path, *overrides: str, several: bool = False) -> Config:
    """A method's config from a YAML file or a shipped method's short name, with ``key=value`` overrides.

    Args:
        several: the overrides are meant for a table of several settings, so one that changes nothing in this setting
            is no mistake.

    Raises:
        UserError: lists every unknown key (with the nearest valid one), wrong type, impossible value, contradiction and
            setting without effect (`fptquant.config.without_effect`), each with its path in the file.

    >>> load_config("rtn", "quantization=w4a8kv8-static").quantization.label
    'w4a8kv8-static'
    """
    data = read_recipe(find_config(path_or_name, "methods"))
    if _TABLE_KEYS & data.keys():
        raise UserError(f"{path_or_name} is a table of several methods; `fptquant table` makes it, other commands take one method")
    overridden, problems = _apply_overrides(data, overrides)
    given, _ = _apply_overrides({}, () if several else overrides)
    return _parse_config(overridden, problems, file=data, given=given, source=str(path_or_name))


def is_table(path_or_name: str | Path) -> bool:
    """Whether a file, or a shipped one's short name, is a table of several methods instead of one method.

    Raises:
        UserError: if there is no such file, or it cannot be read.
    """
    return bool(_TABLE_KEYS & read_recipe(find_config(path_or_name)).keys())


def load_yaml_config(schema: type[_Schema], path_or_name: str | Path, *overrides: str) -> _Schema:
    """What a YAML file of another schema than `Config` says, with overrides; errors as in `load_config`."""
    data, problems = _apply_overrides(read_recipe(find_config(path_or_name)), overrides)
    config, found = _validate(schema, data)
    if config is None or problems:
        raise _problems_error(str(path_or_name), problems + found)
    return config


def parse_config(data: Mapping[str, Any], *, source: str = "the config") -> Config:
    """A config from a mapping with the keys of the YAML file; ``source`` names it in errors.

    Raises:
        UserError: as in `load_config`.
    """
    return _parse_config(data, [], file=data, given={}, source=source)


def _parse_config(
    data: Mapping[str, Any], problems: list[Problem], *, file: Mapping[str, Any], given: Mapping[str, Any], source: str
) -> Config:
    config, found_problems = _validate(Config, data)
    problems = problems + found_problems
    if config is not None:
        contradictions = [(found.paths[0], found.message) for found in find_contradictions(config)]
        problems += contradictions or _without_effect(config, file, given)
    else:
        # Contradictions among the fields that are right are worth knowing in the same message: what is wrong is left
        # out, and what is found about a path that was wrong is not reported twice.
        wrong = [path for path, _ in problems]
        rest, _ = _validate(Config, {"name": "x", **_without(data, wrong)})
        for found in find_contradictions(rest) if rest is not None else ():
            if not any(path == bad or path.startswith(f"{bad}.") for path in found.paths for bad in wrong):
                problems.append((found.paths[0], found.message))
    if problems:
        raise _problems_error(source, problems)
    assert config is not None
    return config


def _without_effect(config: Config, file: Mapping[str, Any], given: Mapping[str, Any]) -> list[Problem]:
    """Settings that change nothing: all that were given as ``key=value``, and those that the file by itself left so."""
    found = find_without_effect(config)
    from_file: set[str] = set()
    if any(not item.by_label and not _has(given, item.path) for item in found):
        alone, _ = _validate(Config, file)
        from_file = {item.path for item in find_without_effect(alone) if not item.by_label} if alone is not None else set()
    return [(item.path, item.message) for item in found if _has(given, item.path) or item.path in from_file]


def _has(data: Mapping[str, Any], path: str) -> bool:
    """Whether a mapping holds the key at a path.

    >>> _has({"local": {"lr": 0.1}}, "local.lr"), _has({"quantization": "w4a16"}, "quantization.prefix")
    (True, False)
    """
    inner: Any = data
    for key in path.split("."):
        if not isinstance(inner, dict) or key not in inner:
            return False
        inner = inner[key]
    return True


def _without(data: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    result: dict[str, Any] = _copy(data)
    for path in paths:
        inner: Any = result
        *above, last = path.split(".")
        for key in above:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return result


def _validate(schema: type[_Schema], data: Mapping[str, Any]) -> tuple[_Schema | None, list[Problem]]:
    try:
        return schema.model_validate(dict(data)), []
    except ValidationError as error:
        return None, [_problem(schema, dict(detail)) for detail in error.errors(include_url=False)]


def _problem(schema: type[BaseModel], detail: dict[str, Any]) -> Problem:
    """One line for one of pydantic's errors."""
    location = [part for part in detail["loc"] if part != "[key]"]
    path = ".".join(str(part) for part in location)
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return path, "unknown key" + _nearest(str(location[-1]), _valid_keys(schema, location[:-1]))
    if kind == "missing":
        return path, "is required"
    if kind == "literal_error":
        expected = detail["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return path, f"{value!r} is not possible" + _nearest(str(value), expected)
    if kind == "value_error":
        return path, str(detail["ctx"]["error"])
    if kind == "string_pattern_mismatch":
        return path, f"{value!r} is not possible; {_FORMS[path]}"
    if kind == "model_type":
        return path, f"must hold keys and values, not {value!r}"
    message = detail["msg"].removeprefix("Input should be ")
    return path, f"must be {message}, not {value!r}"


_FORMS = {
    "device": "write auto, cpu, cuda or cuda:0",
    "name": "use letters, digits, dots, dashes and underscores",
}
"""What the values of fields with a pattern look like."""


def _valid_keys(schema: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """The keys of the model at a location, found by walking the annotations."""
    current: type[BaseModel] = schema
    for key in location:
        field = current.model_fields.get(str(key))
        if field is not None:
            models = [kind for kind in _flatten(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
            current = models[0] if models else current
    return list(current.model_fields)


def _flatten(annotation: Any) -> Iterable[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _flatten(inner)


def _nearest(word: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{hint} (valid: {', '.join(valid)})" if valid else f"{hint} (no keys are valid here)"


def _problems_error(source: str, problems: list[Problem]) -> UserError:
    count = "one mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    lines = [f"  {path}: {message}" for path, message in problems]
    return UserError("\n".join([f"{source} has {count}:", *lines]))


def dump_config(config: BaseModel) -> str:
    """The config as YAML, every default written out; ``load_config`` of it gives a config that does the same.

    A setting that the file made and an override left without effect is written as its default.
    """
    data = config.model_dump(mode="json")
    for item in find_without_effect(config) if isinstance(config, Config) else ():
        if not item.by_label:
            above, _, last = item.path.rpartition(".")
            _at(data, above)[last] = item.default
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _at(data: dict[str, Any], path: str) -> dict[str, Any]:
    for key in path.split("."):
        data = data[key]
    return data


def describe_config(path: Path) -> str:
    """The first sentence of the comment at the head of a config, which says what it is; nothing without a comment."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    sentence, end, _ = comment.partition(". ")
    return sentence + end.strip()
