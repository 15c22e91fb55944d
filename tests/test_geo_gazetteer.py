"""Names of places in texts: what counts, what is none, and what a hit would not tell."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geofast.geo.gazetteer import Entry, Gazetteer, name_key, named, words

ROWS = [
    Entry("continent", "Europe", codes=("EU",)),
    Entry("continent", "North America", codes=("NA",)),
    Entry("country", "France", ("", "  "), "EU", ("FR", "FRA"), ("French",)),
    Entry("country", "Guinea", codes=("GN",)),
    Entry("country", "Guinea-Bissau", codes=("GW",)),
    Entry("country", "Ivory Coast", ("Côte d'Ivoire",), codes=("CI",)),
    Entry("country", "Mexico", parent="NA", codes=("MX",), demonyms=("Mexican",)),
    Entry("country", "Niger", codes=("NE",)),
    Entry("country", "Nigeria", codes=("NG",)),
    Entry("country", "South Africa", codes=("ZA",), demonyms=("South African",)),
    Entry("country", "Turkey", ("Türkiye",), codes=("TR",)),
    Entry("country", "United States", ("USA", "US", "U.S."), "NA", ("US", "USA")),
    Entry("country", "United Kingdom", ("UK", "Britain"), "EU", ("GB", "GBR")),
    Entry("country", "India", codes=("IN",)),
    Entry("region", "New Mexico", parent="US", codes=("US.NM",)),
    Entry("region", "New York", parent="US", codes=("US.NY",)),
    Entry("region", "Texas", parent="US", codes=("US.TX",)),
    Entry("region", "Île-de-France", parent="FR", codes=("FR.11",)),
    Entry("place", "New York City", ("New York", "NYC"), "US.NY"),
    Entry("place", "Mexico City", ("Ciudad de México",), "MX"),
    Entry("place", "Paris", ("Lutetia",), "FR.11"),
    Entry("place", "Paris", ("Paris of Texas",), "US.TX"),
    Entry("place", "York", parent="GB"),
    Entry("place", "Nice", ("Nizza",), "FR"),
    Entry("place", "Most"),
    Entry("place", "Reading", parent="GB"),
    Entry("place", "St. Louis", parent="US"),
    Entry("place", "Long Beach", parent="US"),
    Entry("place", "Łódź"),
    Entry("other", "Gulf of Mexico"),
]
TABLE = Gazetteer(ROWS)


def found(text, table=TABLE):
    return [text[m.start : m.end] for m in table.mentions(text)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        # whole words, and nothing inside another name
        ("Nigeria and Niger", ["Nigeria", "Niger"]),
        ("Guinea-Bissau", ["Guinea-Bissau"]),
        ("Guinea Bissau", ["Guinea Bissau"]),
        ("Guinea, Bissau", ["Guinea"]),
        ("It lies in Guinea. Bissau is not asked for.", ["Guinea"]),
        ("Mexico City, New Mexico", ["Mexico City", "New Mexico"]),
        ("Mexico, the Gulf of Mexico", ["Mexico", "Gulf of Mexico"]),
        ("New York is not York", ["New York", "York"]),
        ("Parisians, Comparison, Nigerian", []),
        ("(Paris)", ["Paris"]),
        ("Paris's streets; the Paris-Nice race", ["Paris", "Paris", "Nice"]),
        # accents, case, hyphens, abbreviations
        ("Cote d\u2019Ivoire", ["Cote d\u2019Ivoire"]),
        ("CÔTE D'IVOIRE, Co\u0302te-d'Ivoire", ["CÔTE D'IVOIRE", "Co\u0302te-d'Ivoire"]),
        ("Lodz and LÓDŹ", ["Lodz", "LÓDŹ"]),
        ("Saint Louis, St Louis, St. Louis.", ["Saint Louis", "St Louis", "St. Louis"]),
        ("ile de france", ["ile de france"]),
        ("FRANCE", ["FRANCE"]),
        ("france, paris", ["france", "paris"]),
        ("I think of france, united kingdom and paris", ["france", "united kingdom"]),
        # short names in capitals, and codes
        ("Let us ask the US about us.", ["US"]),
        ("the U.S. coast", ["U.S"]),
        ("the u.s. coast", ["u.s"]),
        ("let us go", []),
        ("In FR and IN and DE", []),
        # common words
        ("Nice, France.", ["Nice", "France"]),
        ("Answer: Nice", ["Nice"]),
        ("Nice - France\n- Nice views", ["Nice", "France"]),
        ("Guinea - Bissau", ["Guinea"]),
        ("Nice views. Most people like Reading, and the nice city of Nice.", ["Reading", "Nice"]),
        ("most of it was nice reading", []),
        ("Turkey is large. They ate turkey.", ["Turkey"]),
        ("A long beach, then Long Beach; Long beach", ["Long Beach"]),
        # demonyms
        ("A French city in a Mexican state", ["French", "Mexican"]),
        ("They speak French. The French are many.", []),
        ("the South African coast", ["South African"]),
        ("", []),
    ],
)  # fmt: skip
def test_mentions(text, names):
    assert found(text) == names


def test_a_mention_holds_all_that_bear_the_name():
    (york,) = TABLE.mentions("New York")
    assert [(e.level, e.name) for e in york.entries] == [
        ("region", "New York"),
        ("place", "New York City"),
    ]
    assert york.key == "new york"


def test_the_longest_name_wins_over_the_first():
    table = Gazetteer([Entry("place", "Santa Ana"), Entry("place", "Ana de la Sierra")])
    assert found("Santa Ana de la Sierra", table) == ["Ana de la Sierra"]


def test_scripts_without_spaces_are_cut_into_characters():
    table = Gazetteer([Entry("country", "法国"), Entry("place", "巴黎"), Entry("place", "Москва")])
    assert found("这是法国巴黎。 Это Москва.", table) == ["法国", "巴黎", "Москва"]


def test_names():
    assert TABLE.names("country", "FR") == ("France",)  # blank aliases are no names
    assert TABLE.names("country", "GBR") == ("United Kingdom", "UK", "Britain")
    assert TABLE.names("country", "uk") == ("United Kingdom", "UK", "Britain")
    assert TABLE.names("place", "New York") == ("New York City", "New York", "NYC")
    assert TABLE.names("place", "Paris") == ("Paris", "Lutetia")  # the first of namesakes
    assert TABLE.names("place", "Royal Castle in Warsaw") == ("Royal Castle in Warsaw",)
    assert TABLE.names("country", "in") == ("in",)  # a code is written in capitals
    assert TABLE.names("country", " ") == ()
    assert TABLE.names("country", math.nan) == ()


LYON = {"place": "Lyon", "country": "FR", "continent": "EU"}


def test_named():
    place = {"place": "Paris", "region": "Île-de-France", "country": "FR", "continent": "EU"}
    answer = "Lutetia, Ile-de-France"
    assert named(answer, place, TABLE) == {
        "place": True,
        "region": True,
        "country": False,  # inside the region's name
        "continent": False,
    }
    assert named("A French town", place, TABLE)["country"] is True
    assert named("in French", place, TABLE)["country"] is False
    assert named("Mexico City", {"place": "Mexico City", "country": "MX"}, TABLE) == {
        "place": True,
        "country": False,
    }


def test_namesakes_are_told_apart_by_the_other_levels():
    texas = {"place": "Paris", "region": "Texas", "country": "United States"}
    assert named("Lutetia", texas, TABLE)["place"] is False
    assert named("Paris of Texas", texas, TABLE)["place"] is True
    assert named("Lutetia", {"place": "Paris", "country": "FR"}, TABLE)["place"] is True
    # "Paris" alone can mean either
    assert named("Paris", texas, TABLE)["place"] is True


SAME = Gazetteer(
    [
        Entry("continent", "Asia", codes=("AS",)),
        *ROWS,
        Entry("country", "Georgia", parent="AS", codes=("GE",)),
        Entry("country", "Armenia", parent="AS", codes=("AM",)),
        Entry("country", "Colombia", codes=("CO",)),
        Entry("country", "Cuba", codes=("CU",)),
        Entry("country", "Guatemala", codes=("GT",)),
        Entry("country", "Israel", codes=("IL",)),
        Entry("country", "Italy", codes=("IT",)),
        Entry("country", "Lebanon", codes=("LB",)),
        Entry("country", "Singapore", parent="AS", codes=("SG",)),
        Entry("country", "Venezuela", codes=("VE",)),
        Entry("region", "Georgia", parent="US", codes=("US.GA",)),
        Entry("region", "Guatemala", parent="GT", codes=("GT.07",)),
        Entry("region", "Ohio", parent="US", codes=("US.OH",)),
        Entry("region", "Mexico State", ("México",), "MX", ("MX.15",)),
        Entry("place", "Armenia", parent="CO"),
        Entry("place", "Atlanta", parent="US.GA"),
        Entry("place", "Guatemala City", parent="GT.07"),
        Entry("place", "Lebanon", parent="US.OH"),
        Entry("place", "Rome", ("Roma",), "IT"),
        Entry("place", "Rome", parent="US.NY"),
        Entry("place", "Singapore", parent="SG"),
        Entry("place", "Tbilisi", parent="GE"),
        Entry("place", "Venezuela", parent="CU"),
    ]
)


@pytest.mark.parametrize(
    ("text", "level", "code", "is_named"),
    [
        # a region behind a place of its own, or before its country
        ("Atlanta, Georgia", "country", "GE", False),
        ("Atlanta, Georgia", "region", "US.GA", True),
        ("Georgia, USA.", "country", "GE", False),
        ("Georgia (U.S. state)", "country", "GE", False),
        ("Atlanta is a city in Georgia.", "country", "GE", False),
        ("Georgia is a state in the southeastern United States", "country", "GE", False),
        ("the state of Georgia", "country", "GE", False),
        ("It is in the U.S. state of Georgia", "country", "GE", False),
        # and the country of the same name
        ("Tbilisi, Georgia", "country", "GE", True),
        ("Tbilisi, Georgia", "region", "US.GA", False),
        ("Tbilisi is the capital of Georgia", "region", "US.GA", False),
        ("Georgia, Asia", "country", "GE", True),
        ("Georgia, Asia", "region", "US.GA", False),
        ("the country of Georgia", "region", "US.GA", False),
        ("Atlanta, Georgia, and Tbilisi, Georgia", "country", "GE", True),
        ("Atlanta, Georgia, and Tbilisi, Georgia", "region", "US.GA", True),
        # nothing tells: both
        ("Georgia", "country", "GE", True),
        ("Georgia", "region", "US.GA", True),
        ("Georgia. Atlanta is far.", "country", "GE", True),
        ("Georgia and Armenia", "country", "GE", True),
        ("Georgia, not the USA", "country", "GE", True),
        ("Georgia\nUSA", "country", "GE", True),
        ("Tbilisi. Georgia, US, Cuba", "country", "GE", True),
        ("Atlanta, Texas, Georgia", "country", "GE", True),
        # a word of a kind tells only where there is one of it
        ("the state of Israel", "country", "IL", True),
        ("a state of Mexico", "country", "MX", True),
        ("the state of Mexico", "country", "MX", False),
        # a place that is called like a country, and lists
        ("Armenia, Colombia", "country", "AM", False),
        ("Lebanon, Ohio", "country", "LB", False),
        ("Lebanon, Ohio", "country", "US", False),
        ("Lebanon, Israel", "country", "LB", True),
        ("Venezuela, Cuba", "country", "VE", False),
        ("Venezuela, Cuba and Mexico", "country", "VE", True),
        ("Mexico, Venezuela, Cuba", "country", "VE", True),
        # a region or a city that is called like the country it lies in
        ("Guatemala City, Guatemala", "country", "GT", True),
        ("Guatemala City, Guatemala", "region", "GT.07", True),
        ("Mexico City, Mexico", "country", "MX", True),
        ("Mexico City", "country", "MX", False),
        ("Singapore", "country", "SG", True),
        ("Singapore, Singapore", "place", "Singapore", True),
        ("Singapore, Singapore", "country", "SG", True),
        # a city alone does not name its country
        ("Atlanta", "country", "US", False),
        ("Tbilisi", "country", "GE", False),
        ("Atlanta, Georgia", "country", "US", False),
    ],
)  # fmt: skip
def test_a_name_that_several_bear_is_told_by_its_neighbours(text, level, code, is_named):
    assert named(text, {level: code}, SAME) == {level: is_named}


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("Rome, New York", ["Rome US.NY"]),
        ("Rome, New York, United States", ["Rome US.NY"]),
        ("Rome, Italy", ["Rome IT"]),
        ("Paris, Texas, is not Paris, France", ["Paris FR.11", "Paris US.TX"]),
        ("Rome, New York, Nice", ["New York City US.NY", "Nice FR", "Rome IT", "Rome US.NY"]),
        ("Rome and New York", ["New York City US.NY", "Rome IT", "Rome US.NY"]),
        ("New York, New York", ["New York City US.NY"]),
    ],
)  # fmt: skip
def test_a_place_is_told_by_what_follows(text, places):
    found = {e for m in SAME.mentions(text) for e in m.entries if e.level == "place"}
    assert sorted(f"{e.name} {e.parent}" for e in found) == places


TOWNS = Gazetteer(
    [
        *SAME.entries,
        Entry("country", "China", parent="AS", codes=("CN",)),
        Entry("country", "Japan", parent="AS", codes=("JP",)),
        Entry("country", "Peru", codes=("PE",)),
        Entry("region", "Amazonas", parent="PE"),
        Entry("region", "Amazonas", parent="CO"),
        Entry("region", "Beijing", parent="CN", codes=("CN.22",)),
        Entry("region", "Florida", parent="US", codes=("US.FL",)),
        Entry("region", "Indiana", parent="US", codes=("US.IN",)),
        Entry("region", "Missouri", parent="US", codes=("US.MO",)),
        Entry("region", "Northern", parent="US"),
        Entry("place", "Beijing", parent="CN.22"),
        Entry("place", "Florida", parent="CU"),
        Entry("place", "Tijuana", parent="MX"),
    ]
)


@pytest.mark.parametrize(
    ("text", "code", "is_named"),
    [
        # a town of a region elsewhere
        ("Mexico, Missouri", "MX", False),
        ("mexico, missouri", "MX", False),
        ("Mexico, Missouri, USA.", "MX", False),
        ("Mexico (Missouri)", "MX", False),
        ("Mexico, northern Missouri", "MX", False),
        ("Mexico is a city in Missouri.", "MX", False),
        ("Peru, a town of Indiana", "PE", False),
        ("Peru, Florida", "PE", False),  # Cuba's town of Florida does not matter
        ("Cuba, Missouri, and Peru, Indiana", "CU", False),
        ("Cuba, Missouri, and Peru, Indiana", "PE", False),
        ("Cuba, Missouri, and Paris, Texas", "CU", False),
        ("Georgia, Missouri", "GE", False),
        # the country: lists
        ("Mexico, Guatemala and Venezuela", "MX", True),
        ("Mexico, Texas and Florida", "MX", True),
        ("Mexico, Texas, and Guatemala", "MX", True),
        ("Cuba, Mexico, Texas", "MX", True),
        ("Mexico and Texas", "MX", True),
        # behind a place of its own
        ("Tijuana, Mexico, Texas", "MX", True),
        # words that say no such thing
        ("Mexico. Missouri is far.", "MX", True),
        ("Mexico is south of Texas", "MX", True),
        ("Mexico, south of Texas", "MX", True),
        ("the Mexico-Texas border", "MX", True),
        ("the embassy of Mexico in Texas", "MX", True),
        ("Peru, a country in Missouri", "PE", True),
        # its own region, a city, what may be more than a region
        ("Peru, Amazonas", "PE", True),
        ("Mexico, Amazonas", "MX", False),
        ("Japan, Beijing", "JP", True),
        ("Japan, Rome", "JP", True),
        ("Mexico, Georgia", "MX", True),
        ("Mexico, Georgia, USA", "MX", True),  # three countries, perhaps
        ("Mexico, Northern Hemisphere", "MX", True),
    ],
)  # fmt: skip
def test_a_town_that_is_called_like_a_country(text, code, is_named):
    assert named(text, {"country": code}, TOWNS) == {"country": is_named}


def test_a_town_that_the_gazetteer_does_not_have_is_a_mention():
    town, ohio = TOWNS.mentions("Peru, Ohio")
    assert (town.key, town.entries) == ("peru", ())
    assert [e.name for e in ohio.entries] == ["Ohio"]
    unheard = {"place": "Peru", "region": "Ohio", "country": "US"}
    assert named("Peru, Ohio", unheard, TOWNS)["place"] is True


TWO = Gazetteer(
    [
        Entry("continent", "Asia", codes=("AS",)),
        Entry("continent", "Oceania", codes=("OC",), stand_ins=("Australia",)),
        Entry("country", "South Korea", ("Korea",), "AS", ("KR",)),
        Entry("country", "North Korea", ("Korea",), "AS", ("KP",)),
        Entry("country", "Australia", (), "OC", ("AU",), ("Australian",)),
        Entry("country", "New Zealand", (), "OC", ("NZ",)),
        Entry("place", "Seoul", parent="KR"),
        Entry("place", "Pyongyang", parent="KP"),
        Entry("place", "Auckland", parent="NZ"),
    ]
)


@pytest.mark.parametrize(
    ("text", "south", "north"),
    [
        ("Korea", True, True),
        ("Seoul, Korea", True, False),
        ("Pyongyang, Korea", False, True),
        ("South Korea", True, False),
        ("North Korea", False, True),
    ],
)
def test_two_countries_of_a_continent_that_share_a_name(text, south, north):
    assert named(text, {"country": "KR"}, TWO) == {"country": south}
    assert named(text, {"country": "KP"}, TWO) == {"country": north}


def test_beside_the_other_korea_the_shared_name_tells_nothing():
    kr, kp = {"country": "KR"}, {"country": "KP"}
    assert named("Korea", kr, TWO, beside=kp) == {"country": False}
    assert named("South Korea", kr, TWO, beside=kp) == {"country": True}
    assert TWO.names("country", "Korea")[0] == "South Korea"


def test_a_part_that_is_said_for_the_whole():
    sydney = {"country": "AU", "continent": "OC"}
    auckland = {"country": "NZ", "continent": "OC"}
    seoul = {"country": "KR", "continent": "AS"}
    assert named("Australia", sydney, TWO) == {"country": True, "continent": True}
    assert named("Oceania", sydney, TWO) == {"country": False, "continent": True}
    assert named("Auckland, Australia", sydney, TWO)["country"] is True
    assert named("Australia", auckland, TWO) == {"country": False, "continent": True}
    assert named("Australia", auckland, TWO, beside=seoul)["continent"] is True
    assert named("Australia", seoul, TWO) == {"country": False, "continent": False}
    # both lie there; who is asked about it has read it
    assert named("Australia", sydney, TWO, beside=auckland) == {"country": True, "continent": None}
    asked = "Is this in Australia?"
    assert named("Oceania", auckland, TWO, prompt=asked) == {"country": False, "continent": None}
    assert TWO.names("continent", "OC") == ("Oceania",)


def test_what_the_other_place_shares_tells_nothing():
    nice = {"place": "Nice", "country": "France", "continent": "EU"}
    assert named("Nice, France, Europe", nice, TABLE, beside=LYON) == {
        "place": True,
        "country": None,  # FR is France
        "continent": None,
    }
    # The region of the one has the name of the other: only the city's longer name tells.
    city, state = {"place": "New York City"}, {"region": "New York"}
    assert named("New York", city, TABLE, beside=state) == {"place": False}
    assert named("New York City", city, TABLE, beside=state) == {"place": True}
    assert named("New York", city, TABLE) == {"place": True}


def test_what_the_prompt_says_tells_nothing():
    place = {"place": "Mexico City", "country": "Mexico", "continent": "North America"}
    asked = "The city of Mexico City lies in the country of"
    assert named(" Mexico.", place, TABLE, prompt=asked) == {
        "place": None,
        "country": None,
        "continent": False,
    }
    asked = "Is this a Mexican city, and is it nice?"
    assert named("Mexico", place, TABLE, prompt=asked)["country"] is None
    assert named("It is Nice", {"place": "Nice"}, TABLE, prompt=asked) == {"place": True}


def test_missing_values_tell_nothing():
    place = {"place": "", "region": math.nan, "country": None, "continent": "EU"}
    assert named("a Europe, nan, None", place, TABLE) == {
        "place": None,
        "region": None,
        "country": None,
        "continent": True,
    }


def test_blank_aliases_never_hit():
    table = Gazetteer([Entry("place", "Royal Castle in Warsaw", ("", " ", "-"))])
    assert found("Anything - at all.", table) == []
    place = {"place": "Royal Castle in Warsaw"}
    assert named("Anything - at all.", place, table) == {"place": False}
    assert named("The royal castle in Warsaw", place, table) == {"place": False}  # no capitals
    assert named("The Royal Castle in Warsaw", place, table) == {"place": True}


def test_a_landmark_that_nobody_has_heard_of():
    tower = {"place": "Torre de Mexico", "country": "France"}
    castle = {"place": "Museum of France", "country": "Mexico"}
    assert named("The Torre de Mexico", tower, TABLE) == {"place": True, "country": False}
    # The city or country inside its name is no hit, of its own nor of the other's.
    assert named("The Torre de Mexico", castle, TABLE, beside=tower)["country"] is False
    assert named("The Museum of France", castle, TABLE) == {"place": True, "country": False}
    assert named("The Museum of France", tower, TABLE, beside=castle)["country"] is False
    assert named("The Museum of France in France", tower, TABLE, beside=castle)["country"] is True
    # A landmark that is called like something else of the table
    assert named("Texas", {"place": "Texas"}, TABLE) == {"place": True}


def test_own_rows_go_before_those_of_another_gazetteer():
    mine = Gazetteer([Entry("place", "Paris", ("Paname",), "FR"), *TABLE.entries])
    assert mine.names("place", "Paris") == ("Paris", "Paname")
    assert len(mine) == len(ROWS) + 1


@pytest.mark.parametrize(("parent", "fits"), [("", True), ("FR", True), ("US", False)])
def test_a_row_that_says_less_of_where_it_lies_is_not_left_out(parent, fits):
    own = Gazetteer([Entry("place", "Paris", ("Paname",), parent), *TABLE.entries])
    (paris, _) = own.mentions("Paris, Île-de-France")
    assert (own.entries[0] in paris.entries) is fits
    assert "US.TX" not in {entry.parent for entry in paris.entries}


def test_every_row_finds_itself():
    for entry in ROWS:
        for name in (entry.name, *entry.aliases):
            if name.strip():
                assert any(entry in m.entries for m in TABLE.mentions(f"It is {name}."))


@given(st.text(st.one_of(st.sampled_from(" -.,'&aSt"), st.characters()), max_size=12))
def test_a_key_is_the_words(name):
    key = name_key(name)
    assert key == " ".join(words(name)) or (not key and not any(map(str.isalpha, name)))
    assert isinstance(found(f"{name}. {name}", Gazetteer([Entry("place", f"A {name}")])), list)


def test_keys():
    assert name_key("Mt. Æøß-St.  John's") == "mount aeoss saint john s"
    assert name_key("İzmir") == name_key("Izmir") == "izmir"
    assert name_key("-") == name_key("4") == ""  # no letter, no name


def test_bad_rows():
    with pytest.raises(ValueError, match=r"Row 1 of the gazetteer \('B'\) has the level 'town'"):
        Gazetteer([Entry("place", "A"), Entry("town", "B")])
    with pytest.raises(ValueError, match="Row 0 of the gazetteer, a place, has no name"):
        Gazetteer([Entry("place", " ")])
    with pytest.raises(TypeError, match="aliases must be a tuple of names"):
        Gazetteer([Entry("place", "A", "B")])
    with pytest.raises(ValueError, match="place, region, country, continent, not 'city'"):
        named("A", {"city": "A"}, TABLE)


# ---------------------------------------------------------------------------- GeoNames


@pytest.fixture(scope="module")
def world():
    from geofast.data.demos import gazetteer

    try:
        return gazetteer()
    except RuntimeError as error:
        if "the package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.assets
def test_geonames(world):
    counts = {level: sum(e.level == level for e in world.entries) for level in ("place", "country")}
    assert counts == {"place": 34_006, "country": 250}
    assert world.names("country", "US")[0] == "United States"
    assert {"USA", "America"} <= set(world.names("country", "USA"))
    assert world.names("country", "Holland")[:2] == ("Netherlands", "The Netherlands")
    assert {"München", "Monaco di Baviera"} <= set(world.names("place", "Munich"))
    assert world.names("region", "FR.11") == ("Île-de-France",)
    assert world.names("place", "2988507")[0] == "Paris"
    assert not {"MUC", "PAR"} & {name for entry in world.entries for name in entry.aliases}
    text = "Roma is not Mexico City; they speak Spanish in New South Wales, an Australian state."
    assert found(text, world) == ["Roma", "Mexico City", "New South Wales", "Australian"]
    # An alias yields to a country's name, and to another place's
    assert {e.level for m in world.mentions("Mexico") for e in m.entries} >= {"country", "region"}
    assert "Mexico City" not in [e.name for m in world.mentions("Mexico") for e in m.entries]
    assert named("Atlanta, Georgia", {"country": "GE"}, world) == {"country": False}
    assert named("Tbilisi, Georgia", {"country": "GE"}, world) == {"country": True}
    assert named("Lebanon, Ohio", {"country": "LB"}, world) == {"country": False}
    assert "Nice" not in [e.name for m in world.mentions("Niš") for e in m.entries]
    assert named("San José", {"place": "San José", "country": "CR"}, world) == {
        "place": True,
        "country": False,
    }


@pytest.mark.assets
@pytest.mark.parametrize(
    ("text", "level", "codes", "others"),
    [
        ("Mexico, Missouri", "country", "", "MX"),
        ("Norway, Maine", "country", "", "NO"),
        ("Cuba, Missouri", "country", "", "CU"),
        ("Poland, Ohio", "country", "", "PL"),
        ("Peru, Indiana", "country", "", "PE"),
        ("Mexico, Guatemala and Belize", "country", "MX GT BZ", ""),
        ("Nepal, Northern India", "country", "NP IN", ""),
        ("Japan, Beijing", "country", "JP", "CN"),
        ("India, Punjab", "country", "IN", "PK"),
        ("Congo-Kinshasa", "country", "CD", "CG"),
        ("Congo-Brazzaville", "country", "CG", "CD"),
        ("Congo", "country", "CD CG", ""),
        ("Brazzaville, Congo", "country", "CG", "CD"),
        ("Korea", "country", "KR KP", "JP"),
        ("Pyongyang, Korea", "country", "KP", "KR"),
        ("Virgin Islands", "country", "VG VI", "US"),
        ("US Virgin Islands", "country", "VI", "VG US"),
        ("South Africa", "country", "ZA", ""),
        ("Southern Africa", "country", "", "ZA"),
        ("the Central African Republic", "country", "CF", ""),
        ("Central Africa", "country", "", "CF"),
        ("a Latin American city", "country", "", "US"),
        *((f"It lies in {name}.", "continent", "AS", "EU OC") for name in (
            "South Asia", "Southeast Asia", "South-East Asia", "East Asia", "Central Asia",
            "Western Asia", "western Asia",
        )),
        *((f"It lies in {name}.", "continent", "AF", "AS") for name in (
            "West Africa", "East Africa", "Southern Africa", "Central Africa", "North Africa",
            "Sub-Saharan Africa",
        )),
        *((f"It lies in {side} Europe.", "continent", "EU", "AS") for side in (
            "Western", "Eastern", "Northern", "Southern",
        )),
        ("South Africa", "continent", "", "AF"),
        ("the Central African Republic", "continent", "", "AF"),
        ("Asia Minor", "continent", "", "AS"),
        ("Central America", "continent", "NA", "SA"),
        ("a Central American city", "continent", "NA", "SA"),
        ("Latin America", "continent", "", "NA SA"),
        ("Australia", "continent", "OC", "AS"),
        ("Oceania", "country", "", "AU"),
    ],
)  # fmt: skip
def test_what_the_world_is_called(world, text, level, codes, others):
    for code in codes.split():
        assert named(text, {level: code}, world) == {level: True}, code
    for code in others.split():
        assert named(text, {level: code}, world) == {level: False}, code


@pytest.mark.assets
def test_every_country_is_found_by_each_of_its_names(world):
    for entry in world.entries:
        if entry.level == "country":
            for name in (entry.name, *entry.aliases):
                text = f"It lies in {name}, they say."
                assert named(text, {"country": entry.codes[0]}, world) == {"country": True}, name
            for demonym in entry.demonyms:
                text = f"This is the {demonym} capital."
                assert named(text, {"country": entry.codes[0]}, world) == {"country": True}


@pytest.mark.assets
def test_the_largest_cities_are_found_by_their_names(world):
    for entry in [entry for entry in world.entries if entry.level == "place"][:2000]:
        place = {"place": entry.codes[0]}
        assert named(f"It is {entry.name}.", place, world) == {"place": True}, entry
