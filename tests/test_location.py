"""Location encoders: GeoCLIP's trained one, and spherical harmonics with a SIREN."""

from __future__ import annotations

import re
from math import factorial, pi, sqrt

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import lpmv

import geofast as gf
from geofast.cli import main
from geofast.data.demos import geoclip_gallery, geoclip_weights
from geofast.models import describe, location
from geofast.models.twin import random_twin

PARIS, SYDNEY = (48.8584, 2.2945), (-33.8568, 151.2153)
SCALES = [f"location.capsules.{i}.joint" for i in range(3)]


def coordinates(*pairs):
    return torch.tensor(pairs, dtype=torch.float64).view(-1, 2)


def on_earth(n, seed=0):
    rng = np.random.default_rng(seed)
    latitude = np.rad2deg(np.arcsin(rng.uniform(-1, 1, n)))
    return coordinates(*np.stack([latitude, rng.uniform(-180, 180, n)], 1).tolist())


def run(model, pairs, sites=None):
    """Capture `sites` at places [n, 2]."""
    with gf.capture(model, sites) as rows:
        for start in range(0, len(pairs), 1000):
            model.forward(model.prepare(pairs[start : start + 1000]))
    return rows


@pytest.fixture(scope="module")
def geoclip():
    try:
        geoclip_weights()
    except RuntimeError as error:
        if "sha256" in str(error):
            raise
        pytest.skip(str(error))
    return location.geoclip()


# ---------------------------------------------------------------------------- GeoCLIP


@pytest.mark.parametrize(
    ("place", "point"),
    [
        ((0, 180), (1, 0)),
        ((90, 0), (0, 0.486717)),
        (PARIS, (0.010612, 0.341158)),
        (SYDNEY, (0.771187, -0.245495)),
    ],
)
def test_equal_earth(place, point):
    got = location.equal_earth(coordinates(place))
    assert got[0].tolist() == pytest.approx(point, abs=1e-6)


@pytest.mark.assets
def test_the_trained_embeddings(geoclip):
    with torch.inference_mode():
        paris, sydney = geoclip.module(coordinates(PARIS, SYDNEY).float())
    assert paris[:4].tolist() == pytest.approx([-0.01321, 0.00858, -0.00471, 0.00516], abs=1e-5)
    assert (float(paris.norm()), float(sydney.norm())) == pytest.approx((0.2079, 0.2548), abs=5e-5)
    assert float(torch.cosine_similarity(paris, sydney, 0)) == pytest.approx(0.29143, abs=1e-5)
    assert {p.dtype for p in geoclip.module.parameters()} == {torch.float32}


@pytest.mark.assets
def test_every_site_is_what_the_weights_say(geoclip):
    state = torch.load(geoclip_weights(), weights_only=True)
    state = {k: v.double() for k, v in state.items()}
    pairs = on_earth(20)
    rows = run(geoclip, pairs)
    total = 0
    for i in range(3):
        angle = 2 * pi * location.equal_earth(pairs) @ state[f"LocEnc{i}.capsule.0.b"].T
        x = torch.cat([angle.cos(), angle.sin()], 1)
        expected = {"embed": x}
        for at, name in ((1, "layers.0"), (3, "layers.1"), (5, "layers.2")):
            key = f"LocEnc{i}.capsule.{at}"
            x = (x @ state[f"{key}.weight"].T + state[f"{key}.bias"]).relu()
            expected[name] = x
        x = x @ state[f"LocEnc{i}.head.0.weight"].T + state[f"LocEnc{i}.head.0.bias"]
        expected["joint"] = x
        total = total + x
        for name, value in expected.items():
            got = rows[f"location.capsules.{i}.{name}/mean:all"].double()
            # At sigma 256 an angle is some hundreds: float32 knows it to 1e-4.
            torch.testing.assert_close(got, value, atol=2e-3 if i == 2 else 2e-4, rtol=0)
    torch.testing.assert_close(rows["location.joint/mean:all"].double(), total, atol=5e-4, rtol=0)
    assert len(rows) == 16


@pytest.mark.assets
def test_another_packages_weights_do_not_pass_for_geoclips(geoclip):
    state = torch.load(geoclip_weights(), weights_only=True)
    del state["LocEnc1.head.0.bias"]
    with pytest.raises(RuntimeError, match=r"capsules\.1\.head\.bias"):
        location.load_geoclip(state)


@pytest.mark.assets
def test_the_gallery(geoclip):
    gallery = geoclip_gallery()
    assert gallery.shape == (100_000, 2)
    assert np.abs(gallery).max(0) == pytest.approx([79.521722, 179.98352], abs=2e-1)
    assert gallery[0].tolist() == [-50.943392, -72.935664]  # latitude first


@pytest.mark.assets
def test_a_random_encoder_reads_coordinates_better_than_the_trained_one(geoclip):
    gallery = geoclip_gallery()
    pairs = gallery[np.random.default_rng(0).choice(len(gallery), 5000, replace=False)]
    table = pd.DataFrame(pairs, columns=["latitude", "longitude"])
    fold = torch.from_numpy(gf.KFold().assign(table))

    def r2(model):
        rows = run(model, pairs, [*SCALES, "location.joint"])
        y = torch.from_numpy(pairs)
        return [float(gf.cross_validate(x, y, fold).r2.mean()) for x in rows.values()]

    assert r2(geoclip) == pytest.approx([0.988, 0.583, 0.177, 0.9428], abs=0.001)
    assert r2(random_twin(geoclip)) == pytest.approx([0.998, 0.682, 0.173, 0.9704], abs=0.001)


# ---------------------------------------------------------------------------- harmonics


def expected_harmonics(pairs, degrees):
    """Real harmonics by the textbook formula; lpmv has the Condon-Shortley sign, they do not."""
    colatitude, azimuth = np.deg2rad(pairs.numpy() + np.array([90, 180])).T
    columns = []
    for degree in range(degrees):
        for order in range(-degree, degree + 1):
            m = abs(order)
            norm = (2 * degree + 1) / (4 * pi) * factorial(degree - m) / factorial(degree + m)
            legendre = (-1) ** m * sqrt(norm) * lpmv(m, degree, np.cos(colatitude))
            turn = np.cos(m * azimuth) if order >= 0 else np.sin(m * azimuth)
            columns.append(legendre * turn * (sqrt(2) if m else 1))
    return np.stack(columns, 1)


def test_harmonics_are_those_of_scipy():
    pairs = torch.cat([on_earth(50), coordinates((90, 0), (-90, 20), (0, 180), (0, -180), (0, 0))])
    got = location.spherical_harmonics(pairs, 15)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected_harmonics(pairs, 15), atol=1e-10)


def test_harmonics_by_hand():
    # At the equator and longitude -90, colatitude and azimuth are 90 degrees: the y axis.
    got = location.spherical_harmonics(coordinates((0, -90)), 3)[0].tolist()
    y00, y11, y20 = sqrt(1 / (4 * pi)), sqrt(3 / (4 * pi)), -sqrt(5 / (16 * pi))
    y22 = -sqrt(15 / (16 * pi))
    assert got == pytest.approx([y00, y11, 0, 0, 0, 0, y20, 0, y22], abs=1e-12)


def test_harmonics_are_orthonormal_to_degree_39():
    x, weight = np.polynomial.legendre.leggauss(42)
    longitude = np.arange(84) * 360 / 84 - 180
    latitude = np.repeat(np.rad2deg(np.arcsin(x)), 84)
    grid = coordinates(*np.stack([latitude, np.tile(longitude, 42)], 1).tolist())
    area = torch.from_numpy(np.repeat(weight, 84) * 2 * pi / 84)
    y = location.spherical_harmonics(grid, 40)
    torch.testing.assert_close(
        (y.T * area) @ y, torch.eye(1600, dtype=torch.float64), atol=1e-10, rtol=0
    )
    scaled = location.spherical_harmonics(grid, 4, zonal=pi)
    zonal = [0, 2, 6, 12]
    torch.testing.assert_close(scaled[:, zonal], y[:, zonal] * pi)
    others = [i for i in range(16) if i not in zonal]
    torch.testing.assert_close(scaled[:, others], y[:, others], atol=0, rtol=0)


# ---------------------------------------------------------------------------- SIREN


def satclip_state(legendre_polys=10, hidden=24, layers=2, outputs=16, prefix=""):
    """Random weights under the keys of SatCLIP's location encoder, in its float64."""
    torch.manual_seed(0)
    widths = [legendre_polys**2, *[hidden] * layers]
    state = {}
    for i, (a, b) in enumerate(zip(widths, [*widths[1:], outputs], strict=True)):
        name = f"{prefix}nnet.layers.{i}" if i < layers else f"{prefix}nnet.last_layer"
        state[f"{name}.weight"] = torch.randn(b, a, dtype=torch.float64) / a
        state[f"{name}.bias"] = torch.randn(b, dtype=torch.float64) / a
    return state


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_satclips_state_dict(layers):
    state = satclip_state(layers=layers)
    encoder = location.load_satclip(state)
    pairs = on_earth(30)
    harmonics = expected_harmonics(pairs, 10)
    # SatCLIP's code divides by 4 and multiplies by pi where it should divide by 4 pi.
    harmonics[:, [n * n + n for n in range(10)]] *= pi
    x = torch.from_numpy(harmonics)
    expected = {"embed": x}
    for i in range(layers):
        x = x @ state[f"nnet.layers.{i}.weight"].T + state[f"nnet.layers.{i}.bias"]
        x = (30 * x if i == 0 else x).sin()
        expected[f"layers.{i}"] = x
    expected["joint"] = x @ state["nnet.last_layer.weight"].T + state["nnet.last_layer.bias"]
    model = gf.load(encoder, prepare=location.places)
    rows = run(model, pairs.tolist())
    assert len(rows) == layers + 2
    for name, value in expected.items():
        got = rows[f"location.{name}/mean:all"].double()
        torch.testing.assert_close(got, value, atol=2e-5, rtol=0)
    assert expected["joint"].shape == (30, 16)


def test_the_location_encoder_is_found_in_a_checkpoint_of_the_whole_model():
    state = satclip_state(prefix="model.location.") | {"model.visual.fc.weight": torch.ones(2, 2)}
    one, other = location.load_satclip(state), location.load_satclip(satclip_state())
    pairs = on_earth(3)
    torch.testing.assert_close(one(pairs), other(pairs), atol=0, rtol=0)


def test_sizes_of_published_checkpoints():
    state = location.SphericalSiren(40, 512, 2, 256).state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == {
        "nnet.layers.0.weight": [512, 1600],
        "nnet.layers.0.bias": [512],
        "nnet.layers.1.weight": [512, 512],
        "nnet.layers.1.bias": [512],
        "nnet.last_layer.weight": [256, 512],
        "nnet.last_layer.bias": [256],
    }


def test_a_state_dict_of_something_else():
    with pytest.raises(ValueError, match=r"not the state dict of a SIREN.*got none"):
        location.load_satclip({"head.weight": torch.ones(2, 2)})
    state = satclip_state()
    state["nnet.layers.0.weight"] = torch.ones(24, 99)
    with pytest.raises(ValueError, match=r"\[hidden, L \* L\].*got \[24, 99\]"):
        location.load_satclip(state)
    state = satclip_state()
    del state["nnet.layers.1.bias"]
    with pytest.raises(RuntimeError, match=r"nnet\.layers\.1\.bias"):
        location.load_satclip(state)


def test_first_weights_of_a_siren():
    net = location.Siren(100, 64, 3, 8)
    for layer, bound in zip(
        [*net.layers, net.last_layer], [0.01, *[sqrt(6 / 64)] * 3], strict=True
    ):
        for drawn in (layer.weight, layer.bias):
            assert 0.8 * bound < float(drawn.detach().abs().max()) <= bound


# ---------------------------------------------------------------------------- as a model


@pytest.fixture(params=["geoclip", "siren"])
def encoder(request):
    """Either kind, with random weights."""
    torch.manual_seed(0)
    if request.param == "siren":
        return location.SphericalSiren(6, 32, 2, 16)
    return location.GeoCLIPEncoder()


def test_planted_harmonics_are_read():
    model = location.as_model("planted", location.SphericalSiren(5, 32, 2, 16))
    pairs = on_earth(400)
    y = location.spherical_harmonics(pairs, 7)
    fold = torch.arange(400) % 5
    x = run(model, pairs, "location.embed")["location.embed/mean:all"]
    r2 = gf.cross_validate(x, y[:, 1:], fold, [1e-6]).r2.mean(0)
    assert r2[:24].min() > 0.9999  # degrees 1 to 4 are among the features
    assert r2[24:].max() < 0.1  # degrees 5 and 6 are orthogonal to them


def test_a_batch_gives_what_single_places_give(encoder):
    model = location.as_model("random", encoder)
    pairs = on_earth(5)
    together = run(model, pairs)
    for i in range(5):
        for key, row in run(model, pairs[i : i + 1]).items():
            # Angles of some hundreds, at sigma 256, are known to 1e-4 in float32.
            torch.testing.assert_close(row[0], together[key][i], atol=1e-3, rtol=0)


def test_a_pass_stops_at_the_deepest_site(encoder):
    model = location.as_model("random", encoder)
    first = next(site.name for site in model.sites() if site.layer == 0)
    short = model.until(model.sites(first))
    with gf.capture(short, first) as rows:
        short.forward(short.prepare([PARIS, SYDNEY]))
    whole = run(model, [PARIS, SYDNEY])
    (key,) = rows
    torch.testing.assert_close(rows[key], whole[key], atol=0, rtol=0)


def test_twins_of_random_weights(encoder):
    model = location.as_model("random", encoder)
    one, again, other = random_twin(model, 3), random_twin(model, 3), random_twin(model, 4)
    pairs = on_earth(4)
    site = model.sites()[0].name  # of Fourier features, the directions are drawn anew
    if isinstance(encoder, location.SphericalSiren):
        site = "location.layers.0"
    rows = [next(iter(run(m, pairs, site).values())) for m in (model, one, again, other)]
    torch.testing.assert_close(rows[1], rows[2], atol=0, rtol=0)
    assert (rows[1] - rows[0]).abs().max() > 0.01
    assert (rows[1] - rows[3]).abs().max() > 0.01


@pytest.mark.parametrize("way", ["load", "module"])
def test_a_module_of_ones_own(encoder, way):
    if way == "load":
        rows = run(gf.load(encoder, prepare=location.places), [PARIS, SYDNEY], "location.joint")
    else:
        with gf.capture(encoder, "location.joint") as rows, torch.inference_mode():
            encoder(coordinates(PARIS, SYDNEY).float())
    with torch.inference_mode():
        expected = encoder(coordinates(PARIS, SYDNEY).float())
    torch.testing.assert_close(rows["location.joint/mean:all"], expected, atol=1e-6, rtol=0)


def test_models_say_what_they_take(encoder):
    model = gf.load(encoder, prepare=location.places)
    assert model.kind == "location"
    table = describe(model)
    assert "location in, float32" in table
    assert re.search(r"location\S*\.layers\.0( to \S+ \(\d+\))? +(1024|32) ", table)
    with pytest.raises(ValueError, match="reads location, not text"):
        model.reading("text")


@pytest.mark.assets
def test_doctor_of_the_trained_encoder(geoclip):
    found = gf.doctor(geoclip)
    assert found.ok, str(found)
    passed = {check.name for check in found.checks if check.outcome == "pass"}
    assert {"repeats", "batch", "weights"} <= passed


def test_doctor_of_random_weights(encoder):
    found = gf.doctor(location.as_model("random", encoder))
    assert [check.name for check in found.checks if check.outcome == "fail"] == ["weights"]


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ((91, 0), "place 1 of the batch is latitude 91, longitude 0"),
        ((-90.5, 0), "place 1 of the batch is latitude -90.5"),
        ((151.2153, -33.8568), "the latitude first"),
        ((0, 180.5), "longitude 180.5"),
        ((float("nan"), 0), "latitude nan"),
        ((0, float("nan")), "longitude nan"),
        ((0, float("inf")), "longitude inf"),
    ],
)
def test_places_that_are_not_on_earth(encoder, bad, said):
    model = location.as_model("random", encoder)
    with (
        pytest.raises(ValueError, match=said),
        gf.capture(model, "location.joint") as rows,
    ):
        model.forward(model.prepare([PARIS, bad, (91, 91)]))
    assert not any(len(x) for x in rows.values())
    run(model, [(90, 180), (-90, -180)])  # the edges are


def test_what_is_no_pair():
    with pytest.raises(ValueError, match=r"place 1 of the batch is \(1, 2, 3\)"):
        location.places([PARIS, (1, 2, 3)])
    with pytest.raises(ValueError, match=r"coordinates are \[batch, 2\].*got \[3\]"):
        location.GeoCLIPEncoder()(torch.zeros(3))


# ---------------------------------------------------------------------------- by name


def on_the_gallery(n=5000):
    gallery = geoclip_gallery()
    pairs = gallery[np.random.default_rng(0).choice(len(gallery), n, replace=False)]
    return gf.data.from_arrays([f"place {i}" for i in range(n)], *pairs.T)


@pytest.mark.assets
def test_a_probe_of_the_trained_encoder_beside_its_random_twin(geoclip):
    samples = on_the_gallery()
    sites = [*SCALES, "location.joint"]
    found = gf.probe("location:geoclip", samples, sites=sites, controls="random-weights")
    table = found.layers[found.layers["control"] == ""]
    assert list(table["site"]) == sites
    known = {
        "r2": [0.988, 0.583, 0.177, 0.9428],
        "r2:random-weights": [0.998, 0.682, 0.173, 0.9704],
    }
    for column, r2 in known.items():
        assert table[column].tolist() == pytest.approx(r2, abs=0.001)
    assert found.samples["id"].tolist() == samples.table["id"].tolist()
    said = "random-weights scores no lower than geoclip-location, whose R² is then no sign of"
    assert said in " ".join(found.summary().split())


@pytest.mark.assets
def test_the_commands_take_a_location_encoder(geoclip, tmp_path, capsys):
    table = tmp_path / "cities.csv"
    samples = on_the_gallery(300)
    samples.table.assign(name="").to_csv(table, index=False)  # a text nobody could read
    out = tmp_path / "run"
    sites = ["--sites", "location.*", "--control", "random-weights"]
    assert main(["probe", "location:geoclip", str(table), "--out", str(out), *sites]) == 0
    run = gf.open(out)
    assert run.info["counts"] == {"read": 300, "skipped": 0, "why": []}
    assert list(run.layers["site"]) == ["location.joint"] * 2
    assert run.layers["r2"].min() > 0.5
    capsys.readouterr()
    assert main(["sites", "location:geoclip"]) == 0
    assert "location.capsules.2.layers.0 " in capsys.readouterr().out
    assert main(["plan", "location:geoclip", str(table), "--sites", "location.capsules.*.*"]) == 0
    assert "location.capsules.1.embed " in capsys.readouterr().out
    assert main(["doctor", "location:geoclip", "--data", str(table)]) == 0
    assert "all is well" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
def test_satclip_from_a_file(tmp_path, suffix):
    path = tmp_path / f"satclip-l10{suffix}"
    state = satclip_state()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if suffix == ".ckpt" else state, path)
    model = gf.load(f"location:satclip:{path}")
    assert (model.name, model.kind, model.dtype) == ("satclip-l10", "location", torch.float32)
    pairs = on_earth(5)
    expected = location.load_satclip(state)(pairs)
    (rows,) = run(model, pairs.tolist(), "location.joint").values()
    torch.testing.assert_close(rows, expected.detach(), atol=2e-5, rtol=0)
    places = gf.data.from_arrays(["a"] * 60, *on_earth(60).numpy().T)
    found = gf.probe(f"location:satclip:{path}", places, controls="random-weights")
    assert found.layers["site"].nunique() == 4
    assert found.layers["r2"].notna().all()
    double = gf.load(f"location:satclip:{path}", dtype=torch.float64)
    assert double.module(pairs).dtype == torch.float64


def test_what_is_no_location_encoder(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"not a file of torch")
    torch.save({"weight": torch.ones(2)}, tmp_path / "b.pth")
    for name, error, said in (
        (
            "geoclop",
            ValueError,
            "there is no location encoder location:geoclop; write location:geo",
        ),
        ("satclip:", ValueError, "location:satclip:PATH"),
        (f"satclip:{tmp_path / 'c.pth'}", FileNotFoundError, "there is no file .*c.pth"),
        (f"satclip:{tmp_path / 'a.pth'}", RuntimeError, "a.pth cannot be read as a state dict"),
        (f"satclip:{tmp_path / 'b.pth'}", ValueError, "not the state dict of a SIREN"),
    ):
        with pytest.raises(error, match=said):
            gf.load(f"location:{name}")
    with pytest.raises(ValueError, match=r"runs in float32 or float64; got dtype=torch\.bfloat16"):
        gf.load("location:geoclip", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="adapter goes with a checkpoint"):
        gf.load("location:geoclip", adapter="x")


def test_an_encoder_of_ones_own_reads_the_places_of_any_samples(encoder, tmp_path):
    model = location.as_model("random", encoder)
    pairs = on_earth(60).numpy()
    texts = gf.data.from_arrays(["a"] * 60, *pairs.T)
    table = tmp_path / "places.csv"
    pd.DataFrame(pairs, columns=["lat", "lon"]).to_csv(table, index=False)
    options = {"sites": "location.joint", "split": gf.KFold(3), "storage": "rows"}
    one = gf.probe(model, texts, **options)
    other = gf.probe(model, table, **options)
    (x,) = run(model, pairs.tolist(), "location.joint").values()
    for found in (one, other):
        assert found.info["counts"]["read"] == 60
        torch.testing.assert_close(next(iter(found.rows.values())), x, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="takes no prompt"):
        gf.probe(model, texts, prompts="{text}", **options)
    with pytest.raises(
        ValueError, match="'tokens' is for samples of kind text; these are location"
    ):
        gf.probe(model, texts, controls="tokens", **options)
