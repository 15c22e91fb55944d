"""Location encoders: a place in, a vector out. GeoCLIP's, and spherical harmonics with a SIREN.

All of them take `coordinates` [batch, 2], latitude and longitude in degrees, in that order: WGS 84,
latitudes from -90 to 90 and longitudes from -180 to 180. A place is one vector at every site, so
every pool gives the same row.

The sites of a `GeoCLIPEncoder` are those of its capsules, `location.capsules.0.embed` (Fourier
features), `.layers.0` to `.layers.2` and `.joint` (what the capsule adds to the embedding), and
`location.joint`, their sum. Those of a `SphericalSiren` are `location.embed` (the harmonics),
`location.layers.i` and `location.joint`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .model import Batch, Model, Stage
from .structure import Tower

LIBRARY = "location"
"""What names of location encoders begin with, as `load` takes them."""
SIGMAS = (2.0**0, 2.0**4, 2.0**8)


# ------------------------------------------------------------------------------ coordinates


def places(pairs: Sequence[Any]) -> Batch:
    """Make a batch of (latitude, longitude) pairs in degrees; what `load` takes as `prepare`.

    Returns
    -------
    Batch
        `coordinates`, float64 [batch, 2].

    Raises
    ------
    ValueError
        When an input is not such a pair.
    """
    for i, pair in enumerate(pairs):
        if len(pair) != 2:
            msg = f"a place is a pair of latitude and longitude; place {i} of the batch is {pair!r}"
            raise ValueError(msg)
    rows = [[float(latitude), float(longitude)] for latitude, longitude in pairs]
    return {"coordinates": torch.tensor(rows, dtype=torch.float64).view(-1, 2)}


def checked(coordinates: torch.Tensor) -> torch.Tensor:
    """Return coordinates [batch, 2] as they are, once they are known to be on Earth.

    Raises
    ------
    ValueError
        For another shape, and for a place that is NaN or out of range, naming the first one.
    """
    if coordinates.ndim != 2 or coordinates.shape[1] != 2:
        msg = f"coordinates are [batch, 2], latitude and longitude; got {list(coordinates.shape)}"
        raise ValueError(msg)
    limit = coordinates.new_tensor([90, 180])
    good = (coordinates.abs() <= limit).all(1)  # false for NaN, too
    if not good.all():
        i = int((~good).nonzero()[0])
        latitude, longitude = coordinates[i].tolist()
        msg = (
            f"place {i} of the batch is latitude {latitude:g}, longitude {longitude:g}; degrees go "
            "from -90 to 90 and from -180 to 180, the latitude first"
        )
        raise ValueError(msg)
    return coordinates


# ------------------------------------------------------------------------------ GeoCLIP


def equal_earth(coordinates: torch.Tensor) -> torch.Tensor:
    """Project places onto the plane, as GeoCLIP does.

    This is the Equal Earth projection (Savric, Patterson and Jenny, International Journal of
    Geographical Information Science, 2019), scaled so that 180 E on the equator is at x = 1.

    Parameters
    ----------
    coordinates
        [batch, 2], degrees.

    Returns
    -------
    Tensor
        [batch, 2], x and y; (0, 180) is at (1, 0) and the north pole at (0, 0.4867).
    """
    a1, a2, a3, a4 = 1.340264, -0.081106, 0.000893, 0.003796
    latitude, longitude = coordinates.deg2rad().unbind(1)
    t = torch.asin(math.sqrt(3) / 2 * latitude.sin())
    slope = 9 * a4 * t**8 + 7 * a3 * t**6 + 3 * a2 * t**2 + a1
    x = 2 * math.sqrt(3) * longitude * t.cos() / (3 * slope)
    y = a4 * t**9 + a3 * t**7 + a2 * t**3 + a1 * t
    return torch.stack([x, y], 1) * 66.50336 / 180


class FourierFeatures(nn.Module):
    """Random Fourier features of points in the plane (Tancik et al., NeurIPS 2020).

    [batch, 2] to [batch, 512]: cos and sin of 2 pi times the products with 256 directions, drawn
    from a normal distribution of standard deviation `sigma` and never trained.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.register_buffer("directions", torch.empty(256, 2))
        self.directions: torch.Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the directions anew."""
        self.directions.copy_(torch.randn(256, 2) * self.sigma)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Return the features of points."""
        angle = 2 * math.pi * points @ self.directions.T
        return torch.cat([angle.cos(), angle.sin()], 1)


class Capsule(nn.Module):
    """One scale of GeoCLIP's encoder: Fourier features, three hidden layers of 1024, a head."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.features = FourierFeatures(sigma)
        widths = ((512, 1024), (1024, 1024), (1024, 1024))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(*w), nn.ReLU()) for w in widths)
        self.head = nn.Linear(1024, 512)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Return [batch, 512] for points [batch, 2] of the plane."""
        hidden: torch.Tensor = self.features(points)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


class _Sum(nn.Module):
    """A sum as a module, so that a hook can see it."""

    def forward(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts).sum(0)


class GeoCLIPEncoder(nn.Module):
    """GeoCLIP's location encoder: coordinates [batch, 2] in degrees to embeddings [batch, 512].

    The sum of three capsules with Fourier features of sigma 1, 16 and 256, for which image
    embeddings are compared by their cosine (Vivanco Cepeda, Nayak and Shah, NeurIPS 2023,
    arXiv:2309.16020).
    """

    def __init__(self) -> None:
        super().__init__()
        self.capsules = nn.ModuleList(Capsule(sigma) for sigma in SIGMAS)
        self.total = _Sum()

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, which are not of length 1.

        Raises
        ------
        ValueError
            For a place that is not on Earth.
        """
        points = equal_earth(checked(coordinates).to(_dtype(self)))
        return self.total([capsule(points) for capsule in self.capsules])  # type: ignore[no-any-return]

    def geofast_towers(self) -> tuple[Tower, ...]:
        """Return a tower a capsule, and the sum."""
        towers = []
        for i, capsule in enumerate(self.capsules):
            assert isinstance(capsule, Capsule)
            path = f"capsules.{i}.layers"
            towers.append(_tower(f"location.capsules.{i}", path, capsule.layers, capsule.head))
        return (*towers, _tower("location.joint", "total", (), self.total))


def load_geoclip(state: Mapping[str, torch.Tensor]) -> GeoCLIPEncoder:
    """Make GeoCLIP's location encoder from its own state dict.

    Parameters
    ----------
    state
        `location_encoder_weights.pth` of the package geoclip: `LocEnc0.capsule.0.b` and so on.

    Raises
    ------
    RuntimeError
        When keys or shapes are not those of GeoCLIP, as torch says it.
    """
    # LocEnc0.capsule holds the features at 0 and a linear layer at 1, 3 and 5, each before a ReLU.
    parts = {"capsule.0.b": "features.directions"}
    for kind in ("weight", "bias"):
        parts |= {f"capsule.{2 * i + 1}.{kind}": f"layers.{i}.0.{kind}" for i in range(3)}
        parts[f"head.0.{kind}"] = f"head.{kind}"
    names = {f"LocEnc{i}.{a}": f"capsules.{i}.{b}" for i in range(3) for a, b in parts.items()}
    encoder = GeoCLIPEncoder()
    encoder.load_state_dict({names.get(key, key): value for key, value in state.items()})
    return encoder.eval()


def geoclip() -> Model:
    """Return GeoCLIP's trained location encoder, ready to be captured; inputs are places.

    The weights come out of the wheel of geoclip 1.3.0 (40 MB, MIT), which is fetched once, checked
    and never installed or run; float32, on the CPU.

    Returns
    -------
    Model
        `prepare` takes (latitude, longitude) pairs in degrees.

    Raises
    ------
    RuntimeError
        When the wheel cannot be fetched.
    """
    from ..data.demos.geoclip import geoclip_weights

    state = torch.load(geoclip_weights(), map_location="cpu", weights_only=True)
    return as_model("geoclip-location", load_geoclip(state))


# ------------------------------------------------------------------------------ spherical harmonics


def spherical_harmonics(
    coordinates: torch.Tensor, legendre_polys: int, zonal: float = 1.0
) -> torch.Tensor:
    """Return the real spherical harmonics of degrees 0 to `legendre_polys` - 1.

    Column l*l + l + m is Y_lm, orthonormal on the sphere, without the Condon-Shortley sign, at
    colatitude latitude + 90 and azimuth longitude + 180 degrees, as location encoders have it
    (Russwurm et al., ICLR 2024, arXiv:2310.06743). The Legendre functions are normalised before
    they are multiplied up (Holmes and Featherstone, Journal of Geodesy, 2002): plain ones overflow
    float32 at order 30.

    Parameters
    ----------
    coordinates
        [batch, 2], latitude and longitude in degrees.
    legendre_polys
        How many degrees, L.
    zonal
        Multiplies the harmonics of order 0; other than 1 the basis is not orthonormal.

    Returns
    -------
    Tensor
        float64 [batch, L * L].
    """
    latitude, longitude = coordinates.double().deg2rad().unbind(1)
    x, sine_of_colatitude = -latitude.sin(), latitude.cos()
    out = x.new_empty(len(x), legendre_polys**2)
    sectoral = torch.full_like(x, math.sqrt(1 / (4 * math.pi)))  # of degree and order m
    for m in range(legendre_polys):
        if m:
            sectoral = sectoral * sine_of_colatitude * math.sqrt((2 * m + 1) / (2 * m))
        cosine = (m * (longitude + math.pi)).cos() * (math.sqrt(2) if m else zonal)
        sine = (m * (longitude + math.pi)).sin() * math.sqrt(2)
        before, now = torch.zeros_like(x), sectoral
        for l in range(m, legendre_polys):  # noqa: E741 - the degree's name everywhere
            if l > m:
                a = math.sqrt((4 * l * l - 1) / (l * l - m * m))
                b = math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1))
                before, now = now, a * (x * now - b * before)
            out[:, l * l + l - m] = now * sine
            out[:, l * l + l + m] = now * cosine  # last: of order 0 there is the cosine alone
    return out


class SirenLayer(nn.Module):
    """A linear layer and a sine, sin(w0 (Wx + b)), or none (Sitzmann et al., NeurIPS 2020).

    Weights and biases are drawn uniformly from -`bound` to `bound`.
    """

    def __init__(self, inputs: int, outputs: int, bound: float, w0: float | None) -> None:
        super().__init__()
        self.bound = bound
        self.w0 = w0
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases anew."""
        nn.init.uniform_(self.weight, -self.bound, self.bound)
        nn.init.uniform_(self.bias, -self.bound, self.bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, outputs] for [batch, inputs]."""
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.w0 is None else (self.w0 * y).sin()


class Siren(nn.Module):
    """Layers of sines and a linear one; w0 is 30 in the first layer and 1 in all others.

    First weights are drawn up to 1 / inputs, all others up to sqrt(6 / inputs). The dropout that
    SatCLIP was trained with is not there: nothing is trained here.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, outputs: int) -> None:
        super().__init__()
        first = SirenLayer(inputs, hidden, 1 / inputs, 30.0)
        bound = math.sqrt(6 / hidden)
        more = [SirenLayer(hidden, hidden, bound, 1.0) for _ in range(layers - 1)]
        self.layers = nn.ModuleList([first, *more])
        self.last_layer = SirenLayer(hidden, outputs, bound, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, outputs] for [batch, inputs]."""
        for layer in self.layers:
            x = layer(x)
        return self.last_layer(x)  # type: ignore[no-any-return]


class SphericalSiren(nn.Module):
    """Spherical harmonics and a SIREN: coordinates [batch, 2] in degrees to [batch, outputs].

    The encoder of Russwurm et al. (ICLR 2024, arXiv:2310.06743), which SatCLIP trained (Klemmer et
    al., AAAI 2025, arXiv:2311.17179). Theirs take the longitude first; this one takes the latitude.
    Harmonics are computed in float64 and rounded to the dtype of the weights.

    Parameters
    ----------
    legendre_polys
        Degrees of harmonics, L; L * L inputs.
    hidden, layers
        Width and number of the sine layers.
    outputs
        Width of the embedding.
    zonal
        What harmonics of order 0 are multiplied by. See `load_satclip`.
    """

    def __init__(
        self,
        legendre_polys: int = 10,
        hidden: int = 256,
        layers: int = 2,
        outputs: int = 256,
        zonal: float = 1.0,
    ) -> None:
        super().__init__()
        self.legendre_polys = legendre_polys
        self.zonal = zonal
        self.nnet = Siren(legendre_polys**2, hidden, layers, outputs)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, which are not of length 1.

        Raises
        ------
        ValueError
            For a place that is not on Earth.
        """
        harmonics = spherical_harmonics(checked(coordinates), self.legendre_polys, self.zonal)
        return self.nnet(harmonics.to(_dtype(self)))  # type: ignore[no-any-return]

    def geofast_towers(self) -> tuple[Tower, ...]:
        """Return the one tower."""
        return (_tower("location", "nnet.layers", self.nnet.layers, self.nnet.last_layer),)


def load_satclip(state: Mapping[str, torch.Tensor]) -> SphericalSiren:
    """Make SatCLIP's location encoder from its state dict, or from that of the whole model.

    No trained weights of SatCLIP were at hand: keys and shapes are tested with random ones. The
    published code generates its harmonics of order 0 with sqrt((2l + 1) / 4 * pi) in the place of
    sqrt((2l + 1) / (4 pi)) (microsoft/satclip, spherical_harmonics_generate_ylms.py), so that its
    weights have learned to read them pi times too large; they get them so here. It also expands
    every harmonic into powers of the cosine, which float64 cannot hold: at L = 40 they are off by
    up to 4e-4 within 60 degrees of the equator and 0.04 near the poles, of values up to 2; here
    they are not. (At L = 10 both agree to 1e-12.) Checkpoints with a harmonics_calculation other
    than `analytic` were trained with other signs and scales: do not load them.

    Parameters
    ----------
    state
        `torch.load(path)["state_dict"]`. Whatever stands before `nnet.` is left out, and so is all
        that has no `nnet.`, as the image encoder. Loaded in float32.

    Raises
    ------
    ValueError
        When there is no `nnet.layers.0.weight` [hidden, L * L] in it.
    RuntimeError
        When other keys or shapes do not fit, as torch says it.
    """
    inside = {k[k.index("nnet.") :]: v for k, v in state.items() if "nnet." in k}
    first, last = inside.get("nnet.layers.0.weight"), inside.get("nnet.last_layer.weight")
    if first is None or last is None or math.isqrt(first.shape[1]) ** 2 != first.shape[1]:
        got = "none" if first is None else list(first.shape)
        msg = (
            "this is not the state dict of a SIREN on spherical harmonics: nnet.layers.0.weight "
            f"must be [hidden, L * L], beside nnet.last_layer.weight; got {got}"
        )
        raise ValueError(msg)
    layers = len({k for k in inside if k.startswith("nnet.layers.") and k.endswith(".weight")})
    degrees = math.isqrt(first.shape[1])
    encoder = SphericalSiren(degrees, first.shape[0], layers, last.shape[0], zonal=math.pi)
    encoder.load_state_dict(inside)
    return encoder.eval()


# ------------------------------------------------------------------------------ for the engine


def of_places(model: Any) -> bool:
    """Tell, before it is loaded, whether what `load` takes is a location encoder."""
    if isinstance(model, Model):
        return model.kind == "location"
    return isinstance(model, str) and model.startswith(f"{LIBRARY}:")


def load_location(name: str, device: torch.device, dtype: torch.dtype | None) -> Model:
    """Load a location encoder; `load` calls this for `location:geoclip` and `location:satclip:...`.

    Parameters
    ----------
    name
        `geoclip`, or `satclip:PATH` with the path of a state dict, which `torch.save` or
        safetensors wrote, alone or under `state_dict`.
    device
        Where it is to run.
    dtype
        float32 or float64; None takes the former. Degrees in half precision would be off by tens of
        kilometres.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        For any other name or dtype, and for another model's state dict.
    RuntimeError
        When the file cannot be read, or the wheel of geoclip not be fetched.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"a location encoder runs in float32 or float64; got dtype={dtype} (--dtype)"
        )
    kind, _, path = name.partition(":")
    if name == "geoclip":
        model = geoclip()
    elif kind == "satclip" and path:
        model = as_model(Path(path).stem, load_satclip(_state_dict(Path(path).expanduser())))
    else:
        msg = f"there is no location encoder {LIBRARY}:{name}; write {LIBRARY}:geoclip or "
        raise ValueError(msg + f"{LIBRARY}:satclip:PATH, the path being that of a state dict")
    model.module.to(device, dtype)
    return model


def _state_dict(path: Path) -> Mapping[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        msg = (
            f"{path} cannot be read as a state dict ({type(error).__name__}). Of a checkpoint that "
            "holds more than tensors, save the state_dict alone, by torch.save"
        )
        raise RuntimeError(msg) from error
    return found.get("state_dict", found)  # type: ignore[no-any-return]


def as_model(name: str, encoder: GeoCLIPEncoder | SphericalSiren) -> Model:
    """Take an encoder under a name for reports; inputs are (latitude, longitude) pairs."""
    stages = (Stage(encoder, encoder.geofast_towers()),)
    return Model(name, encoder, stages, "location", None, places)


def _dtype(encoder: nn.Module) -> torch.dtype:
    return next(encoder.parameters()).dtype


def _tower(name: str, path: str, blocks: Any, head: nn.Module) -> Tower:
    return Tower(name, path, tuple(blocks), None, (), "all", head)
