"""Types of settings with their bounds, and `STRICT`, the rules by which a settings class is checked.

A settings class is a frozen pydantic dataclass. It is the schema of its config section: field names are keys, types
carry bounds, and the text below a field describes it. Help, tables in the docs and cache keys are generated from it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

Check = tuple[Callable[[Any], bool], str]
"""Test of a value, and the allowed values in words."""
STRICT: Final = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
"""Reject unknown keys, text in place of a number, true in place of 1, infinities and NaN."""
ADAPTER: Final = ConfigDict(strict=True, allow_inf_nan=False)
BOUNDS: Final = (Ge, Gt, Le, Lt)
MAX_NUMBER: Final = 1e30
"""Squares of larger numbers overflow float32."""
MAX_COUNT: Final = 2**31 - 1
MAX_BATCH: Final = 2**16
"""Rows of a batch, tokens of an answer, requests in flight: more would only exhaust memory."""
MAX_SIZE: Final = 2**14
"""Width of a random model, rank of an adapter."""
REQUEST: Final = "{request}"
"""Placeholder of a request in the text around it."""
PRIVATE_CHARACTERS: Final = "@?#"
"""Characters that start a password, a query or a fragment of a URL. Messages, files and folder names must not contain
these parts."""


@dataclass(frozen=True)
class Words:
    """Annotation of a type whose bounds have no short description by themselves."""

    text: str


def _fits_tensor(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a larger integer does not fit into a tensor")
    return value


def _check_public_url(url: str) -> str:
    if re.fullmatch(rf"https?://[^{PRIVATE_CHARACTERS}\s]+", url) is None:
        raise ValueError("not public")
    return url


def _check_wrapper(text: str) -> str:
    if text.count(REQUEST) != 1:
        raise ValueError("not once")
    return text


Positive = Annotated[float, BeforeValidator(_fits_tensor), Field(gt=0, le=MAX_NUMBER)]
NonNegative = Annotated[float, BeforeValidator(_fits_tensor), Field(ge=0, le=MAX_NUMBER)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Count = Annotated[int, Field(gt=0, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
BatchSize = Annotated[int, Field(gt=0, le=MAX_BATCH)]
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Concurrency = Annotated[int, Field(gt=0, le=1024)]
Retries = Annotated[int, Field(ge=0, le=100)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Name = Annotated[str, Field(min_length=1), Words("a name")]
Phrase = Annotated[str, Field(min_length=1), Words("a text")]
Wrapper = Annotated[str, AfterValidator(_check_wrapper), Words("a text with {request} once")]
FilePath = Annotated[str, Words("the path of a file")]
HubId = Annotated[str, Field(min_length=1), Words("a hub id or a folder")]
Dtype = Literal["float32", "bfloat16", "float16"]
Template = Literal["alpaca", "alpaca_newline", "chat"]
PublicUrl = Annotated[
    str,
    AfterValidator(_check_public_url),
    Words("http(s)://... without @, ? and #; an address with a password belongs into OPENAI_BASE_URL"),
]
ServerUrl = Annotated[str, AfterValidator(_check_public_url), Words("http(s)://... without @, ? and #")]


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return in words what a field may be, such as `a number of at least 0, or null`.

    Args:
        annotation: type of the field, with its bounds in `Annotated`.
        metadata: bounds that pydantic has moved out of the annotation.
    """
    if words := [item.text for item in metadata if isinstance(item, Words)]:
        return words[0]
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *more = get_args(annotation)
        return describe(base, [m for item in more for m in getattr(item, "metadata", [item])])
    options = [option for option in get_args(annotation) if option is not NoneType]
    if origin in (Union, UnionType):
        return ", or ".join([describe(options[0], metadata), "null"])
    if origin is Literal:
        return " or ".join(map(str, options))
    if origin is tuple:
        return f"a list of {len(options)} values, each {describe(options[0])}"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return _describe_number("a whole number" if annotation is int else "a number", metadata)
    return "a text"


def _describe_number(kind: str, metadata: Sequence[Any]) -> str:
    bounds = {type(m).__name__: getattr(m, type(m).__name__.lower()) for m in metadata if isinstance(m, BOUNDS)}
    low, high = bounds.get("Ge"), bounds.get("Le")
    above, below = bounds.get("Gt"), bounds.get("Lt")
    high = None if high == MAX_NUMBER else high
    below_text = "2^63" if below == 2**63 else f"{below}"
    if kind == "a number" and low is not None and high is not None:
        return f"{kind} from {low} to {high}"
    if kind == "a number" and low is not None and below is not None:
        return f"{kind} from {low} to below {below_text}"
    if above is not None and below is not None:
        return f"{kind} between {above} and {below_text}"
    start = f" above {above}" if above is not None else f" of at least {low}" if low is not None else ""
    end = f", up to {high}" if high is not None else f", below {below_text}" if below is not None else ""
    return f"{kind}{start}{end}"


def field_checks(kind: type[Any]) -> dict[str, Check]:
    """Return the check of each field of a settings class, without fields that are sections themselves."""
    fields = kind.__pydantic_fields__.items()
    return {n: check_of(f.annotation, f.metadata) for n, f in fields if section_class(f.annotation) is None}


def section_class(annotation: Any) -> type[Any] | None:
    """Return the settings class of a field that is a section, or a mapping of sections; None for any other field."""
    if is_pydantic_dataclass(annotation):
        return annotation
    return next((kind for option in get_args(annotation) if (kind := section_class(option)) is not None), None)


def check_of(annotation: Any, metadata: Sequence[Any] = ()) -> Check:
    """Return a test whether a value of the config is of a type, and a description of the allowed values.

    Args:
        annotation: a type with its bounds.
        metadata: bounds that pydantic has moved out of the annotation.
    """
    annotated: Any = Annotated
    annotated = annotated[(annotation, *metadata)] if metadata else annotation
    adapter = TypeAdapter(annotated, config=ADAPTER)

    def is_allowed(value: Any) -> bool:
        plain = OmegaConf.to_container(value) if isinstance(value, ListConfig | DictConfig) else value
        try:
            adapter.validate_python(plain)
        except ValidationError:
            return False
        return True

    return is_allowed, describe(annotation, metadata)
