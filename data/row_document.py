"""A row of a table or JSON file as a document: its text and provenance by their paths, or what is wrong with it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeGuard

from minka.data.document import BadRow, Document, encode
from minka.data.text_file import not_utf8
from minka.plan.config_sections import DataSection

# The fields of a document that rows may have, each with the columns in which public corpora keep it.
PROVENANCE_COLUMNS = {
    "id": ("id",),
    "source": ("source",),
    "url": ("url",),
    "licence": ("licence", "license"),
    "package": ("package",),
    "version": ("version",),
}
STEP = re.compile(r"([^.\[\]]+)|\[(-?\d*)\]")
SHOWN_FIELDS = 8


class RowReader:
    """Makes documents of rows. `source`: that of a row which names none."""

    def __init__(self, data: DataSection, source: str) -> None:
        self.text_field, self.source = data.text_field, source
        self.named = {name: getattr(data, f"{name}_field", "") for name in PROVENANCE_COLUMNS}
        self.columns = [
            (name, column)
            for name, columns in PROVENANCE_COLUMNS.items()
            for column in columns
            if not self.named[name] and column != data.text_field
        ]
        self.named = {name: field for name, field in self.named.items() if field}

    def document(self, row: object, path: str, number: int) -> Document | BadRow:
        """The row's text and provenance, or what is wrong with it."""
        where = f"{path}:{number}"
        try:
            if not isinstance(row, Mapping):
                what = f"the row is not an object but {_kind_of(row)}"
                raise BadRow("not an object", what, where=where, remedy=f'write {{"{self.text_field}": "..."}}')
            text = row.get(self.text_field)
            if not isinstance(text, str):
                text = self._text(row, where)
            provenance = {"id": where, "source": self.source, **self._provenance(row, where)}
            for name, value in {**provenance, "the text": text}.items():
                if not value.isascii():
                    encode(value, name, where)
        except BadRow as bad:
            return bad
        return Document(**provenance, text=text, path=path, line=number)

    def fields(self) -> dict[str, str]:
        """The paths that the run names: setting -> path."""
        return {"text_field": self.text_field, **{f"{name}_field": field for name, field in self.named.items()}}

    def _text(self, row: Mapping[str, object], where: str) -> str:
        field = self.text_field
        value = _find(row, field, "text_field", where)
        text = _as_text(value, "\n", where) if isinstance(value, str | bytes) or "[]" in field else None
        if text is not None:
            return text
        if value is None or value == []:
            remedy = "correct or remove the row"
        elif _is_list(value) and all(isinstance(item, str) for item in value):
            remedy = f'its items are joined by newlines with \'data.text_field="{field}[]"\'; the first is "{field}[0]"'
        else:
            remedy = _name_one(row, "text_field")
        raise BadRow(f"{field!r} is {_kind_of(value)}, not text", where=where, remedy=remedy)

    def _provenance(self, row: Mapping[str, object], where: str) -> dict[str, str]:
        found = {}
        for name, column in self.columns:
            value = row.get(column)
            if value is not None and name not in found and not _is_list(value):
                text = value if isinstance(value, str) else _as_text(value, ", ", where)
                if text:
                    found[name] = text
        for name, field in self.named.items():
            value = _find(row, field, f"{name}_field", where)
            text = _as_text(value, ", ", where)
            if value is not None and text is None:
                reason = f"{field!r} is {_kind_of(value)}"
                what = f"{reason}, not text or a number (data.{name}_field)"
                raise BadRow(reason, what, where=where, remedy=_name_one(row, f"{name}_field"))
            if text:
                found[name] = text
        return found


def find_field(value: object, field: str) -> object:
    """What a path names in a row: a.b, list[0], or every item of a list: list[].b. Raises KeyError where it is missing.

    A key that is spelled like the whole path comes first. A null on the way is the value.
    """
    if not field or value is None:
        return value
    if isinstance(value, Mapping) and field in value:
        return value[field]
    step = STEP.match(field)
    rest = field[step.end() :] if step else ""
    rest = (rest[1:] or ".") if rest.startswith(".") else rest  # nothing is called "."
    if step and step[1] and isinstance(value, Mapping) and step[1] in value:
        return find_field(value[step[1]], rest)
    if step and step[2] == "" and _is_list(value):
        return [find_field(item, rest) for item in value]
    if step and step[2] and _is_list(value) and -len(value) <= int(step[2]) < len(value):
        return find_field(value[int(step[2])], rest)
    raise KeyError(field)


def _find(row: Mapping[str, object], field: str, setting: str, where: str) -> object:
    try:
        return find_field(row, field)
    except KeyError:
        what = f"the row has no {field!r} (data.{setting})"
        raise BadRow(f"no {field!r}", what, where=where, remedy=_name_one(row, setting)) from None


def _name_one(row: object, setting: str) -> str:
    """The remedy that lists the texts of a row."""
    texts = list(_text_fields(row, ""))
    listed = ", ".join(texts[:SHOWN_FIELDS]) + (", ..." if len(texts) > SHOWN_FIELDS else "")
    return f"set data.{setting} to a field with text: {listed}" if texts else "correct or remove the row"


def _as_text(value: object, joint: str, where: str) -> str | None:
    """Text, a number, or a list of them as text; None for anything else. Raises BadRow for bytes that are not UTF-8."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(where, error) from None
    if isinstance(value, int | float) and not isinstance(value, bool) and joint != "\n":
        return str(value)
    if _is_list(value):
        texts = [_as_text(item, joint, where) for item in value]
        return None if None in texts or not texts else joint.join(filter(None, texts))
    return None


def _text_fields(value: object, path: str) -> Iterator[str]:
    """Paths of all texts in a row."""
    if isinstance(value, str | bytes) and path:
        yield path
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _text_fields(inner, f"{path}.{name}".removeprefix("."))
    elif _is_list(value) and value and path.count("[]") < 2:
        yield from _text_fields(value[0], path + "[]")


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple)


def _kind_of(value: object) -> str:
    names = {type(None): "null", list: "a list", tuple: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), type(value).__name__)
