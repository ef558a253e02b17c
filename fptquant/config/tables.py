"""The schema of a table's YAML file: methods, settings and models, and the values that papers print for them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fptquant.config.labels import canonical_label
from fptquant.config.loading import find_config, is_table, load_config, load_yaml_config
from fptquant.config.schema import Config, Name
from fptquant.config.strict import StrictModel
from fptquant.errors import UserError

FULL_PRECISION = "full precision"
"""The method of the row that every model begins with."""


def _from_text(key: str) -> Any:
    """A text stands for a mapping with a key of its own and the text's last part as its name."""

    def expand(data: Any) -> Any:
        if not isinstance(data, str):
            return data
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).name.removesuffix(".yaml")).lstrip("._-")
        return {"name": name or "model", key: data}

    return BeforeValidator(expand)


class TableMethod(StrictModel):
    """A method of a table, and how it differs from the config of that name."""

    name: Name
    method: str = Field(min_length=1, description="a YAML file, or the name of a shipped method")
    overrides: list[str] = Field(default=[])


class TableModel(StrictModel):
    """A model of a table, and what its runs have in common."""

    name: Name
    model: str = Field(min_length=1, description="as in a method's config")
    overrides: list[str] = Field(default=[])


class Published(StrictModel):
    """A value that a paper prints."""

    model: str
    method: str = Field(description="a method's name in this table, or full precision")
    setting: str | None = Field(default=None, description="none for full precision")
    perplexity: float = Field(gt=0)
    source: str = Field(min_length=1, description="paper and table")
    alone: bool = Field(default=False, description="the table need not run its method or setting: it has a row of its own")

    def is_of(self, model: str, method: str, setting: str | None) -> bool:
        """Whether it is the value of this cell, by whichever label its setting is called."""
        return (self.model, self.method, _label(self.setting)) == (model, method, _label(setting))


class TableConfig(StrictModel):
    """A grid: every method in every setting on every model."""

    name: Name
    models: list[Annotated[TableModel, _from_text("model")]] = Field(min_length=1)
    methods: list[Annotated[TableMethod, _from_text("method")]] = Field(min_length=1)
    settings: list[str] = Field(min_length=1)
    overrides: list[str] = Field(default=[], description="settings of all cells")
    published: list[Published] = Field(default=[])
    output: str = Field(default="runs/{name}", min_length=1)

    @property
    def output_folder(self) -> str:
        """``output`` with its placeholder filled in."""
        return self.output.replace("{name}", self.name)

    def published_value(self, model: str, method: str, setting: str | None) -> Published | None:
        """What a paper prints for this cell."""
        return next((value for value in self.published if value.is_of(model, method, setting)), None)

    def runs(self, value: Published) -> bool:
        """Whether a cell, or full precision, has the method and setting of a published value."""
        if value.method == FULL_PRECISION:
            return True
        methods, settings = [method.name for method in self.methods], [_label(setting) for setting in self.settings]
        return value.method in methods and _label(value.setting) in settings


@dataclass(frozen=True)
class Cell:
    """One method in one setting on one model."""

    model: TableModel
    setting: str
    """As the table's file names it."""
    config: Config

    @property
    def folder(self) -> str:
        """Its run folder, inside that of the table."""
        return f"{model_folder(self.model)}/{self.config.name}-{self.setting}"


def model_folder(model: TableModel) -> str:
    """Where the cells of a model lie, inside the table's folder."""
    return f"cells/{model.name}"


def load_table(path_or_name: str | Path, *overrides: str) -> TableConfig:
    """A table's config from a YAML file or a shipped table's short name; errors as in `fptquant.config.load_config`.

    Where overrides leave out models, methods or settings of the file, their published values are left out, too.
    """
    if not is_table(find_config(path_or_name, "tables")):
        raise UserError(f"{path_or_name} is one method; `fptquant run` takes it, `fptquant table` a table of methods and settings")
    table = load_yaml_config(TableConfig, path_or_name, *overrides)
    if not (overrides and table.published):
        return table
    try:
        whole = load_yaml_config(TableConfig, path_or_name)
    except UserError:  # the overrides give what the file lacks
        return table
    left_out = {model.name for model in whole.models} - {model.name for model in table.models}
    published = [value for value in table.published if table.runs(value) or value.alone or not whole.runs(value)]
    published = [value for value in published if value.model not in left_out]
    return table.model_copy(update={"published": published})


def table_cells(table: TableConfig) -> list[Cell]:
    """The cells, model by model and setting by setting.

    Raises:
        UserError: every mistake of every cell and published value at once; if two cells are one; if cells of one model differ
            in what they share with its full-precision row: the model itself, evaluation, dtype and device.
    """
    cells: list[Cell] = []
    problems: list[str] = []
    for model in table.models:
        for setting in table.settings:
            for method in table.methods:
                given = [f"model={json.dumps(model.model)}", f"quantization={setting}", f"name={method.name}"]
                try:
                    config = load_config(method.method, *given, *table.overrides, *model.overrides, *method.overrides, several=True)
                except UserError as error:
                    problems.append(f"{method.name}, {setting}, {model.name}: {error}")
                else:
                    cells.append(Cell(model, setting, config))
    problems += _strange(table)
    if not problems:
        problems = [*_repeated(cells), *_apart(cells)]
    if problems:
        raise UserError("\n".join([f"the table {table.name} cannot be made:", *dict.fromkeys(problems)]))
    return cells


def _strange(table: TableConfig) -> Iterator[str]:
    """What is wrong with published values: names that the table does not have, and values that it would never show."""
    models, methods = [model.name for model in table.models], [method.name for method in table.methods]
    for value in table.published:
        full = value.method == FULL_PRECISION
        if value.model not in models:
            remedy = "give a model this name ({name: NAME, model: FOLDER}), or leave published values out (published=[])"
            yield f"published: {value.model} is none of the models {', '.join(models)}; {remedy}"
        if full != (value.setting is None):
            yield f"published: {value.method} on {value.model} has {'a setting; leave it out' if full else 'no setting; give one'}"
        elif not (table.runs(value) or value.alone):
            kind, name, valid = ("setting", value.setting or "", table.settings)
            if value.method not in methods:
                kind, name, valid = ("method", value.method, [FULL_PRECISION, *methods])
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            remedy = f"correct it{hint}, or say alone: true if the table is not to run it"
            yield f"published: {name} is none of the {kind}s {', '.join(valid)}; {remedy}"
        elif value.setting is not None and (problem := _label_problem(value.setting)) is not None:
            yield f"published: {problem}"
        if sum(value.is_of(other.model, other.method, other.setting) for other in table.published) > 1:
            yield f"published: {value.method}, {value.setting or '-'} on {value.model} is there twice; keep one"


def _label(setting: str | None) -> str | None:
    """The shortest label of a setting; as it is if it is none."""
    return setting if setting is None or _label_problem(setting) is not None else canonical_label(setting)


def _label_problem(setting: str) -> str | None:
    try:
        canonical_label(setting)
    except UserError as error:
        return str(error)
    return None


def _repeated(cells: Sequence[Cell]) -> list[str]:
    folders = [cell.folder for cell in cells]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    return [f"{folder}: is there twice; give each method and model a name of its own" for folder in twice]


def _apart(cells: Sequence[Cell]) -> list[str]:
    found = []
    first: dict[str, Config] = {}
    for cell in cells:
        shared = first.setdefault(cell.model.name, cell.config)
        for key in ("evaluation", "dtype", "device"):
            if getattr(cell.config, key) != getattr(shared, key):
                found.append(f"{cell.folder}: {key} is another than that of {shared.name}; set it for the whole table or model")
        if cell.config.model != cell.model.model:
            found.append(f"{cell.folder}: an override names another model, {cell.config.model}; give it among the table's models")
    return found
