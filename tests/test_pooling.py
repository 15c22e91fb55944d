import pytest
import torch

from geofast.pooling import ROLES, Pool, parse_pools, pool, role_bit


def test_the_vocabulary():
    assert Pool.parse("cls").parts == (("first", "cls"),)
    assert Pool.parse("last").parts == (("last", "all"),)
    assert Pool.parse("mean").parts == (("mean", "all"),)
    assert Pool.parse("max:patch + min:patch").parts == (("max", "patch"), ("min", "patch"))
    assert Pool.parse("cls+mean:patch").width(384) == 768
    assert [p.name for p in parse_pools(["cls", "mean", "cls"])] == ["cls", "mean"]


@pytest.mark.parametrize(
    "text", ["median", "cls:patch", "mean:", "mean:sky", "", "max+", "last:all", "each:"]
)
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match=r"unknown pool .*write cls, last, mean, max, min or each"):
        Pool.parse(text)


def test_no_pool():
    with pytest.raises(ValueError, match="no pool was given"):
        parse_pools([])


def test_parts_land_side_by_side():
    hidden = torch.randn(2, 5, 7)
    roles = torch.full((2, 5), 1 << role_bit("all") | 1 << role_bit("patch"), dtype=torch.uint8)
    roles[:, 0] = 1 << role_bit("all") | 1 << role_bit("cls")
    out = torch.empty(2, 21)
    pool(hidden, roles, [Pool.parse("cls+mean:patch+max")], [out])
    expected = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1), hidden.amax(1)], 1)
    torch.testing.assert_close(out, expected)
    assert len(ROLES) <= 8


def test_each_token_is_a_row_and_joins_no_other_pool():
    assert Pool.parse("each:patch").each == "patch"
    assert Pool.parse("each").each == "all"
    assert Pool.parse("mean:patch").each is None
    assert Pool.parse("each:patch").width(7) == 7
    with pytest.raises(ValueError, match="each takes every token by itself, and joins no other"):
        Pool.parse("mean:patch+each:patch")
