"""Write `docs/configuration.md` from the configuration dataclasses: docstrings, types, defaults and presets."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ultramem import MemoryConfig, UltraMemError
from ultramem.configuration.decoding import encode
from ultramem.hosts.olmo_core import PRESETS, model_statistics
from ultramem.layers import KINDS
from ultramem.training import RunConfig

PAGE = Path(__file__).with_name("configuration.md")
SEQUENCE_LENGTH = 4096  # that of the papers, for the attention's operations

INTRODUCTION = """\
<!-- Written by docs/generate_configuration.py; run `make docs` after a change of a configuration. -->
# Configuration

A YAML file configures a run of `ultramem train`. Each key has a dotted name, such as `trainer.steps`, by which the
command line can replace its value:

```
ultramem train configs/quickstart.yaml --trainer.steps=200 --model.memory.top_k=8 --trainer.directory=runs/top8
```

Values are YAML 1.2: `null` (None in Python), `true`, `[0.9, 0.95]`; `1e-4` is a number and `2:5` a string. An unknown
key, a value of the wrong type or an invalid value gives a one-line error that names the key and what is valid. So do
a key that is given twice, tags (`!`), anchors and aliases (`&`, `*`), and numbers that are not finite or have more than
64 bits. In Python the dataclasses are `ultramem.MemoryConfig`, `ModelConfig` and `MoEConfig` in
`ultramem.hosts.olmo_core`, and those in `ultramem.training`.

`model.preset` names one of the [presets](#presets). Further keys of `model` replace some of its values, and
`--model.memory=null` removes the memory. With another `model.memory.kind` than the preset's, the values that
[depend on the kind](#defaults-by-kind-of-memory) take the new kind's defaults.
"""

KIND_INTRODUCTION = """\
The defaults of these keys depend on the kind. Setting a field that a kind does not use is an error. Each kind does not
use these fields:

"""

PRESET_INTRODUCTION = f"""\
In Python a preset is `ultramem.hosts.olmo_core.preset(name)`. Parameters are in millions. Active parameters are those
that a token uses: of a table only the rows that it reads, of the experts only the chosen ones. The embedding and the
output layer are counted once if they are tied, as in all presets except `1b`. Operations are those of a forward pass,
per token, at a sequence length of {SEQUENCE_LENGTH}. Bytes are those of the weights and rows that a token reads at
batch size 1 in bfloat16.

The `medium` presets with memory have the initial values `published` and their own learning rates of the values:
UltraMemV2 a constant 1e-3, UltraMem a multiplier of 8; see [the comparison](comparison.md).
"""


def page() -> str:
    """The whole document."""
    parts = [INTRODUCTION, field_table("", RunConfig)]
    for key, kind in sections(RunConfig):
        parts.append(f"## `{key}`\n\n{summary(kind)}\n\n{field_table(key, kind)}")
        if kind is MemoryConfig:
            parts.append(f"### Defaults by kind of memory\n\n{KIND_INTRODUCTION}{unused_fields()}\n{kind_table()}")
    parts.append(f"## Presets\n\n{PRESET_INTRODUCTION}\n{preset_table()}")
    return "\n".join(parts)


def sections(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted key and dataclass of every section below `kind`, each before those in it."""
    for name, hint in get_type_hints(kind).items():
        for option in (hint, *get_args(hint)):
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                yield f"{prefix}{name}", option
                yield from sections(option, f"{prefix}{name}.")


def summary(kind: type) -> str:
    """The text of the docstring before its sections."""
    return (inspect.getdoc(kind) or "").partition("\n\nAttributes:")[0]


def descriptions(kind: type) -> dict[str, str]:
    """The texts of the docstring's `Attributes:` by name.

    Raises:
        UltraMemError: a field has none.
    """
    listed = (inspect.getdoc(kind) or "").partition("\n\nAttributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", listed, flags=re.MULTILINE)
    found = {name: re.sub(r"\s+", " ", text) for name, text in entries}
    for field in dataclasses.fields(kind):
        if field.name not in found:
            raise UltraMemError(f"{kind.__name__}.{field.name} is not described under Attributes: in its docstring")
    return found


def field_table(key: str, kind: type) -> str:
    """Table of key, type, default and meaning of every field."""
    texts, hints, prefix = descriptions(kind), get_type_hints(kind), f"{key}." if key else ""
    rows = [
        (f"`{prefix}{field.name}`", choices(kind, field.name, hints), default(kind, field), texts[field.name])
        for field in dataclasses.fields(kind)
    ]
    return table(("key", "type", "default", "meaning"), rows)


def choices(kind: type, name: str, hints: dict[str, Any]) -> str:
    """A field's type or choices."""
    if kind is MemoryConfig and name == "kind":
        return ", ".join(f"`{choice}`" for choice in KINDS)
    return type_name(hints[name])


def type_name(hint: Any) -> str:
    """A type in terms of YAML."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in options)
    if get_origin(hint) is tuple:
        if options[-1] is Ellipsis:
            return "list of paths" if options[0] is Path else "list of names"
        return f"list of {len(options)} numbers"
    if options:
        return f"{type_name(options[0])} or `null`"
    if dataclasses.is_dataclass(hint):
        return "section"
    return {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}[hint]


def default(kind: type, field: dataclasses.Field[Any]) -> str:
    """The default in YAML."""
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "its own"
    if kind is MemoryConfig and field.name in kind_defaults():
        return "by kind"
    return f"`{as_yaml(field.default)}`"


def as_yaml(value: Any) -> str:
    """A value as one line of YAML."""
    return yaml.safe_dump(encode(value), default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def kind_defaults() -> dict[str, dict[str, Any]]:
    """Defaults that depend on the kind of memory, by field and kind."""
    configs = {kind: MemoryConfig(kind=kind) for kind in KINDS}
    resolved = {
        field.name: {kind: getattr(config, field.name) for kind, config in configs.items()}
        for field in dataclasses.fields(MemoryConfig)
        if field.default is None
    }
    return {name: values for name, values in resolved.items() if set(values.values()) != {None}}


def kind_table() -> str:
    """Table of the defaults that depend on the kind."""
    kinds = list(KINDS)
    rows = [
        (f"`model.memory.{name}`", *(f"`{as_yaml(values[kind])}`" for kind in kinds))
        for name, values in kind_defaults().items()
    ]
    return table(("key", *(f"`{kind}`" for kind in kinds)), rows)


def unused_fields() -> str:
    """List of the fields that each kind does not use."""
    lines = {kind: ", ".join(f"`{name}`" for name in layer.unused) for kind, layer in KINDS.items()}
    return "".join(f"- `{kind}`: {names or 'uses all of them'}\n" for kind, names in lines.items())


def preset_table() -> str:
    """Table of sizes and costs of all presets."""
    rows = []
    for name, config in PRESETS.items():
        costs = model_statistics(config, SEQUENCE_LENGTH)
        counts = (costs.active, costs.total, costs.active_without_embeddings, costs.total_without_embeddings)
        layers = len(config.memory.insertions(config.num_blocks)) if config.memory else 0
        rows.append(
            (
                f"`{name}`",
                f"{config.num_blocks} of {config.d_model}",
                str(layers),
                *(f"{count / 1e6:,.3f}" for count in counts),
                f"{costs.flops_per_token / 1e6:,.1f}",
                f"{costs.bytes_per_token / 1e6:,.2f}",
            )
        )
    counted = ("active", "total", "active without embeddings", "total without embeddings")
    return table(("preset", "blocks of width", "memory layers", *counted, "MFLOP per token", "MB per token"), rows)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    temporary = PAGE.with_suffix(".partial")
    temporary.write_text(page(), encoding="utf-8")
    temporary.replace(PAGE)
    print(f"written to {PAGE}")
