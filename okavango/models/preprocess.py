"""The input that a checkpoint was trained on, as data: a versioned union `Image | Raster | Volume | Text`.

A `Preprocess` maps each modality of a backbone to one spec. It is stored in the checkpoint, frozen, picklable, and usable in
DataLoader workers without the model. It takes arrays and tensors; readers of files live in `okavango.data`.

Version 1 of the format is final: fields are only added with a default, a change of meaning needs a new version and a migration.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FORMAT_VERSION = 1
ADDED = ("deviations", "absent_on", "nearest_nm", "adapted")  # fields that came later

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PreprocessError(ValueError):
    """The data does not fit the spec; the message says how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Resize:
    """How an input of another size is brought to the spec's size.

    Attributes:
        rule: "exact" ignores the aspect, "shortest" scales the shortest side and crops the centre, "pad" scales the longest side
            and pads, "crop" crops or pads at the native scale, "short_side" scales the shortest side to `size[0]`, lets the other
            follow (rounded down) and crops nothing, "none" leaves the size alone.
        interpolation: "nearest", "bilinear", "bicubic", "area" or "lanczos".
        antialias: low-pass filter when shrinking.
        corners: "half_pixel" (torchvision, PIL) or "aligned" (`align_corners=True`).
        crop_ratio: the input is scaled to `size / crop_ratio` before the centre crop (timm's crop_pct).
        multiple_of: when rule is "none", sides must divide by this; 1 allows any.
        fill: value of padded cells, in the units of what is resized, see `on`.
        on: "native" resizes before the value scale is applied (8-bit images; of rasters, the float values in their units before
            normalisation), "normalised" resizes the normalised float tensor.
    """

    rule: Literal["exact", "shortest", "pad", "crop", "short_side", "none"] = "shortest"
    interpolation: Literal["nearest", "bilinear", "bicubic", "area", "lanczos"] = "bicubic"
    antialias: bool = True
    corners: Literal["half_pixel", "aligned"] = "half_pixel"
    crop_ratio: float = 1.0
    multiple_of: int = 1
    fill: float = 0.0
    on: Literal["native", "normalised"] = "native"

    def __post_init__(self):
        _check_choices(self)
        if self.crop_ratio <= 0 or self.multiple_of < 1:
            raise PreprocessError(
                f"resize: crop_ratio {self.crop_ratio}, multiple_of {self.multiple_of}; expected above 0, at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Values after the scale: how they are standardised.

    Attributes:
        rule: "standard" (x - mean) / std; "minmax" (x - low) / (high - low); "stretch" the same, clipped to 0..1, then mean and std
            where given; "percentile" the same with percentiles of the sample; "zscore" mean and std of the sample itself;
            "zscore_nonzero" the same over non-zero cells only, zero stays zero; "deviations" the sample's mean -+ `deviations`
            standard deviations become 0 and 1, clipped; "none". Standard deviations of a sample divide by the number of cells.
        mean, std, low, high: one number per channel, in the units after `scale` and `offset`; mean and std of "stretch" and
            "percentile" are applied to their result, 0..1.
        percentiles: lower and upper percentile for "percentile".
        clip: bounds applied after the rule, or None.
        quantise: round down to this many levels after "stretch" or "percentile" (256 for 8-bit pipelines), 0 for none.
        batch_dependent: statistics are taken over the whole batch.
        origin: where the statistics come from, e.g. "imagenet-1k train".
        deviations: see the rule of that name.
    """

    rule: Literal["standard", "minmax", "stretch", "percentile", "zscore", "zscore_nonzero", "deviations", "none"] = "none"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    percentiles: tuple[float, float] | None = None
    clip: tuple[float, float] | None = None
    quantise: int = 0
    batch_dependent: bool = False
    origin: str = ""
    deviations: float = 2.0

    def __post_init__(self):
        _check_choices(self)
        needed = {"standard": ("mean", "std"), "minmax": ("low", "high"), "stretch": ("low", "high")}.get(self.rule, ())
        for name in needed:
            if not getattr(self, name):
                raise PreprocessError(f"normalise: rule {self.rule!r} needs {name}, one number per channel")
        if len(self.mean) != len(self.std) or len(self.low) != len(self.high):
            raise PreprocessError("normalise: mean and std, low and high come in pairs of the same length")
        if self.rule in ("minmax", "zscore", "zscore_nonzero", "deviations", "none") and self.mean:
            raise PreprocessError(f"normalise: rule {self.rule!r} takes no mean and std; leave them out")


@dataclass(frozen=True, kw_only=True)
class Image:
    """Photographs and other pictures of few channels.

    Attributes:
        channels: names in the order that the network expects, e.g. ("red", "green", "blue"). Pictures of three channels are RGB
            and are reordered when the network wants another order. A picture of one channel is repeated for a network of three;
            alpha is dropped.
        size: height and width in pixels.
        scale, offset: network value = stored value * scale + offset, before normalisation (1/255 for 8-bit input).
        resize, normalise: see there.
    """

    channels: tuple[str, ...] = ("red", "green", "blue")
    size: tuple[int, int] = (224, 224)
    scale: float = 1 / 255
    offset: float = 0.0
    resize: Resize = field(default_factory=Resize)
    normalise: Normalise = field(
        default_factory=lambda: Normalise(rule="standard", mean=IMAGENET_MEAN, std=IMAGENET_STD, origin="imagenet-1k train")
    )

    def __post_init__(self):
        _check_channels(self)


@dataclass(frozen=True, kw_only=True)
class Raster:
    """Images of named spectral or radar bands. How data are brought to it by name: `okavango.models.raster`.

    Attributes:
        channels: band names in the order that the network expects.
        wavelengths: centre of each band in nanometres, None where it has none (radar); empty when unknown.
        sensor: e.g. "sentinel-2"; level: processing level, e.g. "L2A"; units: of the network's values before normalisation, one of
            "dn", "reflectance", "db", "linear", "u8", "kelvin".
        scale, offset: one number per band, or one for all: value in `units` = stored value * scale + offset. Stored values are the
            sensor's numbers, for Sentinel-2 without the offset of baseline 04.00; 8-bit units with a scale are cut to 0..255 and
            rounded down.
        valid: lowest and highest value in `units` that is possible, or None; used to notice input that is already normalised.
        nodata: stored value that means "no measurement", or None; nodata_fill: what it becomes after normalisation.
        absent: value of a band that the data lacks, after normalisation, or None to refuse.
        resolution: ground sampling distance in metres, or None.
        absent_on: "normalised", or "native" where `absent` stands for a value before normalisation (only to repeat pipelines that
            padded their data first).
        nearest_nm: a band that the data lack under its name is taken from the nearest wavelength, at most so many nanometres away;
            0 for never.
        adapted: how the first layer of a network made for other channels was brought to these, see `okavango.models.channels`.
    """

    channels: tuple[str, ...]
    wavelengths: tuple[float | None, ...] = ()
    sensor: str = ""
    level: str = ""
    units: str = "reflectance"
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    valid: tuple[float, float] | None = None
    nodata: float | None = None
    nodata_fill: float = 0.0
    absent: float | None = None
    resolution: float | None = None
    size: tuple[int, int] = (224, 224)
    resize: Resize = field(default_factory=Resize)
    normalise: Normalise = field(default_factory=Normalise)
    absent_on: Literal["normalised", "native"] = "normalised"
    nearest_nm: float = 0.0
    adapted: str = ""

    def __post_init__(self):
        _check_choices(self)
        _check_channels(self)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Three-dimensional scans, one volume per named sequence.

    Attributes:
        channels: sequence names, e.g. ("t1", "t1c", "t2", "flair").
        aliases: other names by which data may call a sequence, ((alias, name), ...).
        size: depth, height and width in voxels (the array's own order of axes).
        spacing: millimetres per voxel along each axis, or None for "as stored".
        orientation: axis codes such as "RAS", or None for "as stored".
        units: of the stored values, e.g. "arbitrary" or "hounsfield"; scale, offset: as for `Image`.
        foreground: crop to the non-zero box first.
        resize, normalise: as elsewhere; `resize.rule` "crop" crops and pads at the native spacing.
    """

    channels: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    size: tuple[int, int, int] = (128, 128, 128)
    spacing: tuple[float, float, float] | None = None
    orientation: str | None = None
    units: str = "arbitrary"
    scale: float = 1.0
    offset: float = 0.0
    foreground: bool = False
    resize: Resize = field(default_factory=lambda: Resize(rule="crop", interpolation="bilinear"))
    normalise: Normalise = field(default_factory=lambda: Normalise(rule="zscore_nonzero"))

    def __post_init__(self):
        _check_channels(self)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text and how it is tokenised.

    Attributes:
        tokenizer: name that `transformers` or `open_clip` resolves, with the library as prefix, e.g. "hf/roberta-base".
        revision: commit or version of the tokenizer; sha256: of its vocabulary file, "" when unknown.
        length: tokens per text; longer text is cut, shorter is padded with `pad`.
        lower: fold to lower case first.
    """

    tokenizer: str
    revision: str = ""
    sha256: str = ""
    vocabulary: int = 0
    length: int = 77
    pad: int = 0
    begin: int | None = None
    end: int | None = None
    lower: bool = False


ArraySpec = Image | Raster | Volume
InputSpec = ArraySpec | Text
_KINDS: dict[str, type] = {"image": Image, "raster": Raster, "volume": Volume, "text": Text}


@dataclass(frozen=True)
class Preprocess(Mapping[str, InputSpec]):
    """Modality name -> spec, and the call that brings raw arrays into that shape.

    Example:
        >>> import numpy as np
        >>> Preprocess(image=Image(size=(32, 32)))(image=np.zeros((40, 48, 3), np.uint8))["image"].shape
        torch.Size([1, 3, 32, 32])
    """

    specs: tuple[tuple[str, InputSpec], ...]

    def __init__(self, specs: Mapping[str, InputSpec] | None = None, /, **modalities: InputSpec):
        object.__setattr__(self, "specs", tuple({**(specs or {}), **modalities}.items()))

    def __getitem__(self, modality: str) -> InputSpec:
        for name, spec in self.specs:
            if name == modality:
                return spec
        raise KeyError(modality)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __call__(self, *, allow: Any = None, **inputs: Any) -> dict[str, Any]:
        """Turn raw inputs into batches of tensors that the backbone takes as ``model(**result)``.

        Args:
            allow: {switch: reason} for what the reconciliation of rasters would refuse, see `okavango.models.raster.plan`.
            **inputs: per modality one sample, a list of samples or a batch: uint8 or float, (H, W) or (H, W, C) for numpy and PIL,
                (H, W) or (C, H, W) for tensors, with a leading B for a batch. 8-bit values are 0..255, floats are in the units
                that `scale` and `offset` start from. A raster is a `Bands`, a list of them, or a plain array together with
                ``allow={"undescribed": reason}``. Volumes come under any of their aliases, as arrays (D, H, W) or as
                `okavango.models.volume.Scan`, in lists with None for a study that lacks the modality.
        Returns:
            modality -> float32 tensor (B, C, H, W), or (B, C, D, H, W) of volumes; where a study lacks one, "present" too.
        Raises:
            PreprocessError: unknown modality, wrong number of channels, already normalised input.
        """
        from okavango.models import raster  # noqa: F401  (registers itself; torch is imported only when data arrives)
        from okavango.models._apply import apply

        out: dict[str, Any] = {}
        volumes: dict[str, Any] = {}  # together, because the sequences of a study stay on one grid
        for given, value in inputs.items():
            name = self.resolve(given)
            if name in volumes:
                raise PreprocessError(f"modality {name!r} was given twice, once as {given!r}")
            if isinstance(self[name], Volume):
                volumes[name] = value
            else:
                out[name] = apply(self[name], value, name, **({"allow": allow} if allow else {}))
        if volumes:
            from okavango.models.volume import batches

            out |= batches(self, volumes)
        return out

    def resolve(self, given: str) -> str:
        """The modality that a name or, for volumes, an alias such as "T1Gd" means; upper and lower case are the same there.

        Raises:
            PreprocessError: neither; the message lists what is known.
        """
        if given in self:
            return given
        aliases = {alias.lower(): name for name, spec in self.specs if isinstance(spec, Volume) for alias in _names(name, spec)}
        if given.lower() in aliases:
            return aliases[given.lower()]
        others = sorted(set(aliases) - set(self))
        more = f" (also known as {', '.join(others)})" if others else ""
        raise PreprocessError(f"unknown modality {given!r}: this checkpoint takes {', '.join(self) or 'none'}{more}")

    def array(self, modality: str = "image") -> ArraySpec:
        """The spec of a modality that comes as arrays, which have channels, a size and a normalisation.

        Raises:
            PreprocessError: it is text.
        """
        spec = self[modality]
        if isinstance(spec, Text):
            raise PreprocessError(f"modality {modality!r}: is text; expected one that comes as arrays")
        return spec

    def replace(self, modality: str, **changes: Any) -> Preprocess:
        """A copy in which some fields of one spec differ."""
        return Preprocess({**dict(self.specs), modality: dataclasses.replace(self[modality], **changes)})

    def to_json(self) -> dict:
        """Plain JSON: ``{"version": 1, "specs": {modality: {"kind": ..., fields}}}``.

        Fields that the format did not begin with are left out where they have their default, so that what was written before them
        stays as it is.
        """
        kinds = {cls: kind for kind, cls in _KINDS.items()}
        return {
            "version": FORMAT_VERSION,
            "specs": {name: {"kind": kinds[type(spec)], **_fields(spec)} for name, spec in self.specs},
        }

    @classmethod
    def from_json(cls, data: Mapping) -> Preprocess:
        """Read what `to_json` wrote.

        Raises:
            PreprocessError: unknown version, kind, field or choice; a field that is missing.
        """
        if data.get("version") != FORMAT_VERSION:
            raise PreprocessError(
                f"preprocess format {data.get('version')!r}: this okavango reads {FORMAT_VERSION}; install a newer one"
            )
        if not isinstance(data.get("specs"), Mapping):
            raise PreprocessError("preprocess: field 'specs' is missing; expected modality -> spec")
        specs = {}
        for name, entry in data["specs"].items():
            kind = entry.get("kind") if isinstance(entry, Mapping) else None
            if kind not in _KINDS:
                raise PreprocessError(f"preprocess of {name!r}: unknown kind {kind!r}; expected {', '.join(_KINDS)}")
            fields = {key: value for key, value in entry.items() if key != "kind"}
            specs[name] = _build(_KINDS[kind], fields, f"preprocess of {name!r}")
        return cls(specs)


def _names(modality: str, spec: Volume) -> tuple[str, ...]:
    """What a modality of one channel may be called; of several channels, aliases name the channels."""
    return (modality, *spec.channels, *(alias for alias, _ in spec.aliases)) if len(spec.channels) == 1 else (modality,)


def _fields(spec: Any) -> dict[str, Any]:
    """Name -> value of a spec's fields, nested specs too."""
    out = {}
    for each in dataclasses.fields(spec):
        value = getattr(spec, each.name)
        if each.name not in ADDED or value != each.default:
            out[each.name] = _fields(value) if dataclasses.is_dataclass(value) else value
    return out


def _build(cls: type, fields: Any, where: str):
    """A frozen dataclass from JSON: lists become tuples, nested specs are built, unknown fields are refused."""
    if not isinstance(fields, Mapping):
        raise PreprocessError(f"{where}: expected a JSON object, got {fields!r}")
    hints = _hints(cls)
    unknown = set(fields) - set(hints)
    if unknown:
        raise PreprocessError(f"{where}: unknown field {sorted(unknown)[0]!r}; expected {', '.join(hints)}")
    values = {}
    for key, value in fields.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            value = _build(typing.cast(type, hint), value, f"{where}, {key}")
        elif isinstance(value, list):
            value = _tuples(value)
        elif value is None and not (isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)):
            raise PreprocessError(f"{where}: {key} must not be null")
        values[key] = value
    for each in dataclasses.fields(cls):
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and each.name not in values:
            raise PreprocessError(f"{where}: field {each.name!r} is missing")
    return cls(**values)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check_choices(spec: Resize | Normalise | Raster) -> None:
    """Each field of a few allowed values holds one of them."""
    kind: type = type(spec)
    for name, hint in _hints(kind).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if choices and getattr(spec, name) not in choices:
            what = kind.__name__.lower()
            raise PreprocessError(f"{what}: {name} {getattr(spec, name)!r}; expected one of {', '.join(map(repr, choices))}")


def _check_channels(spec: ArraySpec) -> None:
    """What is given per channel is given for each of them."""
    count, rule = len(spec.channels), spec.normalise
    numbers: dict[str, tuple] = {"mean": rule.mean, "std": rule.std, "low": rule.low, "high": rule.high}
    if isinstance(spec, Raster):
        numbers |= {"wavelengths": spec.wavelengths, "scale": spec.scale, "offset": spec.offset}
    for name, values in numbers.items():
        single = name in ("scale", "offset") and len(values) == 1
        if values and not single and len(values) != count:
            raise PreprocessError(f"{name} has {len(values)} numbers for {count} channels: {', '.join(spec.channels)}")
