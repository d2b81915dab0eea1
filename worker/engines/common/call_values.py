"""Arguments that a model writes one by one, as rules of llguidance's Lark.

The rules express what a schema allows in the model's own notation for values: bare text, whose type
the schema gives (`typed_arguments` reads it back), Python keyword arguments, or Gemma's quotes.
Properties come in the schema's order; if it declares any, no others are allowed. A string's
`format` is not enforced: to JSON Schema it is an annotation. A schema that cannot be expressed
raises `Unsayable`. Must never widen one.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from worker.engines.common.call_forms import Form, shared_start
from worker.engines.common.schemas import for_llguidance
from worker.engines.common.typed_arguments import referred, typed

__all__ = ["OneByOne", "Rules", "Unsayable", "quoted", "slashed", "takes_none"]


class Unsayable(Exception):
    """A schema or a name cannot be expressed in a form of calls; the message says what and why."""


def quoted(text: str) -> str:
    """A text as a string in Lark, which is written as in JSON."""
    return json.dumps(text, ensure_ascii=False)


def slashed(pattern: str) -> str:
    """A regular expression in Lark."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern) + "/"


class Rules:
    """Collects the rules of a grammar."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[tuple[str, str], str] = {}

    def add(self, kind: str, body: str, options: str = "") -> str:
        """Add a rule, unless there is one of this kind with the same body; returns its name."""
        if (kind, body) not in self._names:
            self._names[kind, body] = name = self.reserve(kind)
            self.define(name, body, options)
        return self._names[kind, body]

    def terminal(self, body: str) -> str:
        """Add a terminal; returns its name."""
        return self.add("T", body)

    def lazy(self, body: str) -> str:
        """Add a rule that matches as little text as it can; returns its name."""
        return self.add("lazy", body, "[lazy]")

    def json(self, schema: dict[str, Any] | bool, options: Mapping[str, Any]) -> str:
        """Add a rule for a value in JSON; returns its name."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return self.add("json", f"%json {json.dumps(schema | {'x-guidance': dict(options)})}")

    def reserve(self, kind: str) -> str:
        """A name for a rule that is defined later."""
        name = f"{kind}{len(self._bodies)}"
        self._bodies[name] = ""
        return name

    def define(self, name: str, body: str, options: str = "") -> None:
        """Set the body of a reserved rule."""
        self._bodies[name] = f"{options}: {body}"

    def grammar(self, start: str) -> str:
        """The grammar with all rules."""
        return "\n".join([f"start: {start}", *(n + body for n, body in self._bodies.items())])


@dataclass(slots=True)
class _Parts:
    """What a schema allows, taken apart."""

    #: Strings that it lists, and the keywords that constrain other strings.
    literals: list[str] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    #: Schemas of anything else.
    others: list[dict[str, Any]] = field(default_factory=list)
    #: It allows any value.
    any: bool = False

    def add(self, more: _Parts) -> None:
        self.literals += more.literals
        self.texts += more.texts
        self.others += more.others
        self.any = self.any or more.any


_NOTES: Final = frozenset(
    (
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly"),
        *("writeOnly", "$comment", "$schema", "$id", "id", "$defs", "definitions", "strict"),
    )
)
"""Keywords that only annotate."""
_STRINGS: Final = ("minLength", "maxLength", "pattern")
_KNOWN: Final = frozenset(("type", "enum", "const", "nullable", "format", *_STRINGS))
_COMBINED: Final = ("anyOf", "oneOf", "allOf", "not", "if", "$dynamicRef", "dependentSchemas")
_KEY: Final = re.compile(r"[\w$-]+", re.ASCII)
_JSON: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_PYTHON: Final = _JSON | {"json_allowed_escapes": 'nrt"\\'}
"""Only escapes that mean the same in Python, which reads a surrogate pair as two characters."""
_NO_TEXT: Final = (
    r"\s*[\[{](?s:.*)",
    r"\s*[-+]?[0-9_.]*([eE][-+]?[0-9_]*)?\s*",
    r"\s*([tT][rR][uU][eE]|[fF][aA][lL][sS][eE])\s*",
)
"""Bare texts that may be read as something else where a schema allows more than strings."""
_ANY_TEXT: Final = "(?s:.*)"
_MAX_DEPTH: Final = 8


class OneByOne:
    """The arguments of one tool in one form. `said` writes a text in Lark, special tokens by id."""

    def __init__(
        self, form: Form, schema: Mapping[str, Any], rules: Rules, said: Callable[[str], str]
    ) -> None:
        self._form = form
        self._root = schema
        self._rules = rules
        self._said = said
        #: What ends every value; the mark in it ends a bare text.
        self._closes = shared_start(form.separator, form.ends) if form.style == "text" else ""
        self._more = said(form.separator[len(self._closes) :])
        self._over = said(form.ends[len(self._closes) :])

    def call(self, name: str) -> str:
        """A call, from its name up to the text that ends it."""
        form = self._form
        if form.style == "python" and not all(map(_is_word, name.split("."))):
            raise Unsayable("its name is not a Python name")
        schema = self._resolved(self._root)
        begins = self._said(name + form.middle)
        written = [f"{begins} {one} {self._over}" for one in self._keys(schema, self._argument)]
        if not schema.get("required"):
            written.append(self._said(name + form.none))
        return " | ".join(written)

    # --- objects ----------------------------------------------------------------------------------

    def _keys(self, schema: Mapping[str, Any], argument: Callable[[str, Any], str]) -> list[str]:
        """The ways of writing an object that is not empty, from its first key to its last value."""
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, Sequence):
            raise Unsayable("its properties are not a map")
        if found := set(schema) & {*_COMBINED, "minProperties", "maxProperties", "propertyNames"}:
            raise Unsayable(f"`{min(found)}` cannot be enforced on values written one by one")
        if missing := [key for key in required if key not in properties]:
            raise Unsayable(f"it requires {missing[0]!r}, which is not one of its properties")
        if not properties:
            if takes_none(schema):
                return []
            others = schema.get("additionalProperties", True)
            if schema.get("patternProperties"):
                raise Unsayable("`patternProperties` cannot be enforced on keys that are not JSON")
            key = self._rules.terminal("/[A-Za-z_][A-Za-z0-9_]*/")
            one = self._rules.add("any", argument("", others).replace('"\x00"', key))
            return [f"{one} ({self._more} {one})*"]
        keys = list(properties)
        for key in keys:
            if not _KEY.fullmatch(key) or (self._form.style == "python" and not _is_word(key)):
                raise Unsayable(f"the name of its argument {key!r} cannot be written")
        rest = ""
        ways: list[str] = []
        for key in reversed(keys):
            try:
                one = self._rules.add("key", argument(key, properties[key]))
            except Unsayable as error:
                raise Unsayable(f"argument {key!r}: {error}") from None
            first = f"{one} {rest}"
            # Any key up to and including the first required one may be the first to be written.
            ways = [first] if key in required else [first, *ways]
            more = f"({self._more} {one})" + ("" if key in required else "?")
            rest = self._rules.add("rest", f"{more} {rest}")
        return ways

    def _argument(self, key: str, schema: Any) -> str:
        """A key with its value, and the text that ends the value."""
        form, parts = self._form, self._parts(schema, _MAX_DEPTH)
        if not key:
            key = "\x00"
        if form.style == "gemma":
            return f"{self._key(key, form.value_begins)} ({self._gemma(parts, _MAX_DEPTH)})"
        if form.style == "python":
            return f"{self._key(key, form.value_begins)} ({self._python(parts)})"
        ways = [
            f"{self._key(key, form.text_begins)} {text}" for text in self._bare(key, schema, parts)
        ]
        if parts.others:
            value = self._rules.json(self._json(parts.others), _JSON)
            ends = self._said(self._closes)
            ways.append(f"{self._key(key, form.value_begins)} {value} {ends}")
        if not ways:
            raise Unsayable("none of its values can be written as bare text")
        return " | ".join(ways)

    def _key(self, key: str, begins: str) -> str:
        if key == "\x00":
            return f'"\x00" {self._said(begins)}'
        return self._said(key + begins)

    # --- bare text --------------------------------------------------------------------------------

    def _bare(self, key: str, schema: Any, parts: _Parts) -> list[str]:
        """Bare texts, each with what ends it."""
        if parts.any:
            return [self._text(_ANY_TEXT, [])]
        if parts.literals or parts.texts:
            # Where a string is allowed, the text `null` is a string.
            parts.others = [other for other in map(_without_null, parts.others) if other]
        mixed = bool(parts.others)
        whole = {"properties": {key: schema}} | _definitions(self._root)
        literals = [
            text
            for text in parts.literals
            if typed(text, key, whole) == text == text.strip() and self._stop not in text
        ]
        found = [f"{quoted(text)} {self._said(self._closes)}" for text in literals]
        for keywords in parts.texts:
            least, most = keywords.get("minLength", 0), keywords.get("maxLength")
            but = list(_NO_TEXT) if mixed else []
            body = _ANY_TEXT
            if least or most is not None:
                body = f"(?s:.{{{least},{'' if most is None else most}}})"
            held = [body]
            if "pattern" in keywords:
                held.append(_searched(keywords["pattern"]))
            if keywords:
                but += [r"\n(?s:.*)", r"(?s:.*)\n", f"(?s:.*){re.escape(self._stop)}(?s:.*)"]
            found.append(self._text(" & ".join(map(slashed, held)), but, is_lark=True))
        return found

    @property
    def _stop(self) -> str:
        """The mark that ends a bare text."""
        return self._closes.strip() or '<|"|>'

    def _text(self, body: str, but: Sequence[str], *, is_lark: bool = False) -> str:
        """A text up to the first mark that ends it, and the mark."""
        body = body if is_lark else slashed(body)
        said = self._said(self._closes)
        before, token, behind = said.partition("<[")
        if not token:
            text = self._rules.terminal(_but(body, but))
            return self._rules.lazy(f"{text} {said}")
        text = self._rules.terminal(_but(body, [*but, f"(?s:.*){re.escape(self._stop)}(?s:.*)"]))
        text = self._rules.terminal(f"{text} {before}") if before.strip() else text
        return f"{text} {token}{behind}"

    # --- Python -----------------------------------------------------------------------------------

    def _python(self, parts: _Parts) -> str:
        if parts.any:
            return self._rules.json({}, _PYTHON)
        ways, others = [], []
        for other in parts.others:
            match other.get("type"):
                case "boolean" if set(other) == {"type"}:
                    ways += ['"True"', '"False"']
                case "null":
                    ways.append('"None"')
                case _:
                    others.append(other)
        others += [{"type": "string", **keywords} for keywords in parts.texts]
        if parts.literals:
            others.append({"enum": parts.literals})
        if others:
            ways.append(self._rules.json(self._json(others), _PYTHON))
        return " | ".join(ways)

    # --- Gemma ------------------------------------------------------------------------------------

    def _gemma(self, parts: _Parts, depth: int) -> str:
        if not depth:
            raise Unsayable("it is nested too deeply")
        ways = []
        if parts.any:
            ways.append(self._gemma_text([slashed(_ANY_TEXT)]))
            scalar = {"type": ["number", "boolean", "null"]}
            ways.append(self._rules.json(scalar, _JSON))
        for keywords in parts.texts:
            least, most = keywords.get("minLength", 0), keywords.get("maxLength")
            held = [slashed(f"(?s:.{{{least},{'' if most is None else most}}})")]
            if "pattern" in keywords:
                held.append(slashed(_searched(keywords["pattern"])))
            ways.append(self._gemma_text(held if keywords else [slashed(_ANY_TEXT)]))
        quote = self._said(self._form.text_ends)
        ways += [f"{quote} {quoted(text)} {quote}" for text in parts.literals]
        for other in parts.others:
            if other.get("type") == "object":
                made = self._keys(self._resolved(other), self._nested(depth))
                ways += [f'"{{" {way} "}}"' for way in made]
                if not other.get("required"):
                    ways.append('"{}"')
            elif other.get("type") == "array":
                ways.append(self._gemma_list(other, depth))
            elif any(isinstance(value, dict | list) for value in other.get("enum", ())):
                raise Unsayable("its enum contains lists or maps")
            else:
                ways.append(self._rules.json(self._json([other]), _JSON))
        return " | ".join(ways)

    def _nested(self, depth: int) -> Callable[[str, Any], str]:
        def argument(key: str, schema: Any) -> str:
            value = self._gemma(self._parts(schema, depth - 1), depth - 1)
            return f"{self._key(key or chr(0), ':')} ({value})"

        return argument

    def _gemma_text(self, held: list[str]) -> str:
        quote = self._said(self._form.text_ends)
        mark = f"(?s:.*){re.escape(self._form.text_ends)}(?s:.*)"
        if "<[" in quote:
            return f"{quote} {self._rules.terminal(_but(' & '.join(held), [mark]))} {quote}"
        text = self._rules.terminal(_but(" & ".join(held), [mark]))
        return f"{quote} {self._rules.lazy(f'{text} {quote}')}"

    def _gemma_list(self, schema: Mapping[str, Any], depth: int) -> str:
        if found := set(schema) & {"prefixItems", "contains", "uniqueItems", *_COMBINED}:
            raise Unsayable(f"`{min(found)}` cannot be enforced on lists that are not JSON")
        items = self._parts(schema.get("items", True), depth - 1)
        one = self._rules.add("item", self._gemma(items, depth - 1))
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        bounds = f"{{{max(least - 1, 0)},{'' if most is None else int(most) - 1}}}"
        some = f'"[" {one} ("," {one}){bounds} "]"'
        return some if least else f'{some} | "[]"'

    # --- schemas ----------------------------------------------------------------------------------

    def _parts(self, schema: Any, depth: int) -> _Parts:
        """Take a schema apart. Raises `Unsayable` for keywords that cannot be enforced."""
        if schema is False or not depth:
            raise Unsayable("nothing is allowed" if depth else "it is nested too deeply")
        if not isinstance(schema, Mapping) or not set(schema) - _NOTES:
            return _Parts(any=True)
        keywords = set(schema) - _NOTES
        for single in ("$ref", "allOf", "anyOf", "oneOf"):
            if single not in keywords:
                continue
            inner = schema[single]
            if single == "$ref":
                inner = [referred(str(inner), self._root)]
                if inner == [None]:
                    raise Unsayable(f"it refers to {schema[single]!r}, which it does not have")
            if single == "allOf" and len(inner) != 1:
                raise Unsayable("`allOf` cannot be enforced")
            if keywords - {single, "type"}:
                raise Unsayable(f"`{single}` beside other keywords cannot be enforced")
            made = _Parts()
            for one in inner:
                made.add(self._parts(one, depth - 1))
            if single == "oneOf" and len(made.texts) + bool(made.literals) > 1:
                raise Unsayable("`oneOf` with several kinds of text cannot be enforced")
            return made
        if found := keywords & set(_COMBINED):
            raise Unsayable(f"`{min(found)}` cannot be enforced")
        return self._simple(schema)

    def _simple(self, schema: Mapping[str, Any]) -> _Parts:
        declared = schema.get("type")
        types = [declared] if isinstance(declared, str) else list(declared or ())
        if not types and "properties" in schema:
            types = ["object"]
        made = _Parts()
        if schema.get("nullable") is True and "null" not in types:
            made.others.append({"type": "null"})
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else list(schema["enum"])
            made.literals = [
                v for v in values if isinstance(v, str) and (not types or "string" in types)
            ]
            rest = [value for value in values if not isinstance(value, str)]
            if rest:
                made.others.append({"enum": rest} | ({"type": types} if types else {}))
            return made
        if not types:
            raise Unsayable(f"it has `{min(set(schema) - _NOTES)}` but no `type`")
        if "string" in types:
            made.texts.append({k: schema[k] for k in _STRINGS if k in schema})
        about = {k: v for k, v in schema.items() if k not in _NOTES and k not in _KNOWN}
        for type_ in types:
            if type_ != "string":
                bare = type_ in ("boolean", "null")
                made.others.append({"type": type_} | ({} if bare else about))
        return made

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema of an object, with a reference to another followed."""
        for _ in range(_MAX_DEPTH):
            if "$ref" not in schema:
                return schema
            found = referred(str(schema["$ref"]), self._root)
            if not isinstance(found, Mapping):
                break
            schema = found
        raise Unsayable("it refers to a schema that it does not have")

    def _json(self, schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The schema of values that satisfy one of these."""
        one = dict(schemas[0]) if len(schemas) == 1 else {"anyOf": list(schemas)}
        if references := _references(one):
            one |= _definitions(self._root)
            references = _references(one)
        if not all(name.startswith(("#/$defs/", "#/definitions/")) for name in references):
            raise Unsayable("it refers to something outside its definitions")
        try:
            made = for_llguidance(one)
        except (TypeError, ValueError) as error:
            raise Unsayable(str(error)) from None
        except RecursionError:
            raise Unsayable("it is nested too deeply") from None
        assert isinstance(made, dict)
        return made


def _but(body: str, others: Sequence[str]) -> str:
    """A terminal for what matches the body and none of the others."""
    return " & ".join([body, *(f"~{slashed(other)}" for other in others)])


def _is_word(text: str) -> bool:
    return text.isidentifier() and text.isascii() and not keyword.iskeyword(text)


def takes_none(schema: Mapping[str, Any]) -> bool:
    """Whether a tool takes no arguments: it declares none, whether by an empty list of properties
    or by an empty schema."""
    if schema.get("properties"):
        return False
    held = set(schema) - _NOTES
    return schema.get("additionalProperties") is False or (
        held <= {"type", "properties", "required"} and ("properties" in held or not held)
    )


def _without_null(schema: dict[str, Any]) -> dict[str, Any] | None:
    if schema.get("type") == "null":
        return None
    if "enum" in schema:
        values = [value for value in schema["enum"] if value is not None]
        return schema | {"enum": values} if values else None
    return schema


def _definitions(root: Mapping[str, Any]) -> dict[str, Any]:
    return {name: root[name] for name in ("$defs", "definitions") if name in root}


def _references(schema: Any) -> list[str]:
    if isinstance(schema, Mapping):
        own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
        return own + [found for value in schema.values() for found in _references(value)]
    if isinstance(schema, list):
        return [found for value in schema for found in _references(value)]
    return []


def _searched(pattern: str) -> str:
    """An expression that matches the whole of a text in which the schema's pattern occurs."""
    if "(?" in pattern.replace("(?:", "") or re.search(r"\\[bBAzZ]", pattern):
        raise Unsayable(f"the pattern {pattern!r} cannot be enforced")
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    inner = pattern[begins : len(pattern) - ends]
    if re.search(r"(?<![\\\[])[\^]|(?<!\\)\$", inner) or ((begins or ends) and "|" in inner):
        raise Unsayable(f"the pattern {pattern!r} cannot be enforced: it has an anchor inside")
    inner = inner.replace(r"\d", "[0-9]").replace(r"\w", "[0-9A-Za-z_]")
    return f"{'' if begins else _ANY_TEXT}(?:{inner}){'' if ends else _ANY_TEXT}"
