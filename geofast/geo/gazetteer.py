"""Which places a text names: whole words, the longest name first, nothing inside another name.

Names are compared word by word, accents, case and hyphens apart: "Cote d'Ivoire" is
"Côte-d'Ivoire", "St. Louis" is "Saint Louis". A name inside a longer one is none of its own:
"Guinea-Bissau" does not name Guinea, nor "New Mexico" Mexico. Whether a word is a name at all is
told by capitals:

- every word that the table writes with a capital has one in the text, and short words in capitals
  (US, UK) have capitals alone. A text without any capital, and the names of countries and
  continents in any text, are excused from it;
- a common word (`COMMON`: Nice, Split, Turkey) needs its capital everywhere; where it begins a
  sentence it names no place or region unless it stands alone: "Nice, France." counts, "Nice views."
  does not, and neither does "Nice is in France.";
- a demonym counts before a word for a place: "a French port" names France, "in French" does not.

Of namesakes the neighbours tell which is meant: one in which the name before it lies, or which lies
in the name after it. "Atlanta, Georgia" and "Georgia, USA" name no country Georgia, "Tbilisi,
Georgia" no state, "Paris, Texas" no capital. "The state of Georgia" tells by its words. What no
neighbour tells means all of them, and so does a name in a list of its like ("Paris, Rome, New
York"). A city never names the country that it lies in.

Many a town too small for a table is called like a country: before a region of another country,
set off by a comma or called a town, a country's name is not that country ("Norway, Maine"), but
for lists ("Mexico, Texas and Arizona") and for regions called like their city ("Japan, Beijing").

Scripts without spaces (Chinese, Japanese) are cut into characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

LEVELS = ("place", "region", "country", "continent")
"""From the smallest to the largest."""

OTHER = "other"
"""Level of a name that is none of these, but has one inside: the Gulf of Mexico, Latin America."""

_COMMON = """
    acre acres afar airport alley alliance along also amen anchor anew annex anthem apex apple
    archway as ash aurora badger bake bale bane bank bar barking basic bath batman bay beach
    bear begun bell bend bender best big black blue bolt bone bong boom borne boulder bow bra
    brick bride bridge brown brush buffalo bury bush butterfly button buy caller camp can canton
    capital cascade cat center central centre centurion century chad cherry china church city
    clay coast cocoa coin colon columbine come commonwealth conception concord confederation
    converse cork corner corona cove creek crystal cypress daisy dandy date deal defiance deli
    delta diamond dig dining dire do dole dome dour drama drug dual eagle east eastern eden elk
    enterprise erode evergreen fair falcon far fate federal fish flag fleet flint flora fold
    force forest fort fountain fox free freedom gap garden gate gay genes genet glass god goes
    gold golden good goodyear google gore grad grapevine gray great green grenade grove guinea
    hail hale hang harmony harrow heath hem high highland hill hills hillside hire his hit ho
    holiday homestead homo hook horde horn house hub hue hull human humble hurricane imperial in
    independence is island it ivy jam jersey jordan joy justice kale keystone king lac lake
    lakeside lama laurel lead leek leer lend lens level liberal liberty lice lily lime limo lion
    log logos lone long lop lower luck magenta mainland male man manage manga mango manly march
    marina maritime mark market marsh mascara mascot mead meadow media meds mentor meridian mesa
    meta midland midway mile mill mine mission mobile mocha mojo mole mon mono monster moon moor
    moss most mount mountain much mustang name natural new nice normal north northeast
    northeastern northern northwest od ode of off officer ogre okay old on opportunity or oral
    orange orient oriental overland pa pace page palm panda panorama papa para paradise
    paramount pare park parole pass peace pearl peel peer pen pest pets pilot pine pinto pioneer
    plain plains plantation plaque plateau plum plunge polar police pool pop port portage posse
    post pout pride prince pristine prosper puma punch queen rapid rapids reading ready red
    republic reservoir rest retreat reunion rich ridge riverside robin rock rocky role roles
    rose rouge ruby ruse rush rye saga sage saint sake sal sale salt same sand sandy savage save
    say scarlet se sea seaside sedan semi shaping she shell shone shore shush side silver sire
    sky slough smart so soda solo soma soul sound sour south southeastern southern southwest
    sparks split spoken spring springs star steel stella stoke stone store story stow success
    sue sugar sulphur summer summit sun sunrise sunset superior sur surprise swan sweet table
    tag tame tango tank tape temple tequila terrace than the thorn thunder tide tiger time tip
    tire to tome torn torrent tour tower trail tree trident trinity troll tunes turbo turk
    turkey turn twin un under union unity university upland uptown us vale valley valve van
    vicar victor view village vine vineyard vista wa walnut ware water wave wedding weed weir
    welcome well wells west western wheeling white wing winter wolf wonder wood woodland worth
    yard ye yellow yoga young zeta
"""
COMMON = frozenset(_COMMON.split())
"""Lower-case English words that are names of places as well."""

_PLACE_WORDS = """
    archipelago capital cities city coast coastal coastline countryside county department district
    hometown island islands mainland metropolis mountain mountains municipality port province
    provinces region regions resort seaside state states territory town towns village villages
"""
PLACE_WORDS = frozenset(_PLACE_WORDS.split())
"""What a demonym stands before when it says where something is."""

_LINKS = """
    , ( - \u2013 \u2014 a an the in of is lies located situated which
    city town capital largest state country
    north south east west northern southern eastern western central
    northeastern northwestern southeastern southwestern
"""
LINKS = frozenset(_LINKS.split())
"""What stands between a place and what it lies in, if anything does."""

_JOINS = frozenset((",", "and", "or"))
_KINDS = {"state": "region", "province": "region", "country": "country"}
_SHORT = {"&": "and", "st": "saint", "ste": "sainte", "mt": "mount", "ft": "fort"}
_LETTERS = "\u3040-\u30ff\u3400-\u9fff"  # kana and Chinese characters: each a word
_TOKEN = re.compile(
    rf"[{_LETTERS}]|[^\W_{_LETTERS}]+(?:[\u0300-\u036f]+[^\W_{_LETTERS}]*)*|\n|[^\w\s]|_"
)
_DASHES = frozenset("-\u2010\u2011\u2012\u2013\u2014")
_SOFT = _DASHES | frozenset("'\u2018\u2019\u02bb\u02bc`\u00b4\u00b7")
_MARKS = re.compile("[\u0300-\u036f]+")
_SIMPLE = re.compile("[a-z0-9]+(?:(?:-| +)[a-z0-9]+)*")
_STARTS = _DASHES | frozenset('.!?:\n"\u201c\u201e\u00ab\u2022*#>')
_PLAIN = str.maketrans(
    {
        "ø": "o",
        "đ": "d",
        "ð": "d",
        "ł": "l",
        "ħ": "h",
        "\u0131": "i",
        "æ": "ae",
        "œ": "oe",
        "þ": "th",
    }
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of a gazetteer."""

    level: str
    """One of `LEVELS`, or `OTHER`."""
    name: str
    """The usual name."""
    aliases: tuple[str, ...] = ()
    """Other names that a text may use. Blank ones name nothing."""
    parent: str = ""
    """Name or code of what it lies in, at any higher level; tells namesakes apart."""
    codes: tuple[str, ...] = ()
    """What a table may call it (ISO 3166 FR, FRA); a text never does."""
    demonyms: tuple[str, ...] = ()
    """Adjectives (French), which count before a word for a place."""
    stand_ins: tuple[str, ...] = field(default=(), hash=False)  # hashing many names takes a while
    """Names of parts that are said for the whole: Australia, where Oceania is asked for."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A name in a text: `text[start:end]`."""

    start: int
    end: int
    key: str
    """Its words, folded."""
    entries: tuple[Entry, ...]
    """What bears that name; where its neighbours tell which is meant, that alone.

    None for a town called like a country that the gazetteer does not have.
    """


class Gazetteer:
    """Names of places, found in texts.

    Parameters
    ----------
    entries : iterable of Entry
        Rows, the better known first: of namesakes, the first is meant where nothing else tells.
        `[*mine, *other.entries]` puts own rows before those of another gazetteer.

    Raises
    ------
    ValueError
        For a row without a name or of an unknown level.
    TypeError
        For aliases, codes, demonyms or stand-ins that are one string in place of a tuple.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        self._phrases: dict[str, tuple[int, ...]] = {}
        self._forms: dict[str, str] = {}
        self._longest: dict[str, int] = {}
        self._codes: dict[tuple[str, str], int] = {}
        self._usual: list[str] = []
        self._known: dict[tuple[object, ...], Entry | None] = {}
        self._demonyms: dict[str, tuple[int, ...]] = {}
        self._higher: dict[tuple[str, str], tuple[Entry, ...]] = {}
        for row, entry in enumerate(self.entries):
            _check(row, entry)
            self._usual.append(name_key(entry.name))
            self._add(self._phrases, row, entry.name, self._usual[-1])
            for name in entry.aliases:
                self._add(self._phrases, row, name, name_key(name))
            for name in entry.demonyms:
                self._add(self._demonyms, row, name, name_key(name))
            for code in entry.codes:
                self._codes.setdefault((entry.level, code), row)

    def _add(self, table: dict[str, tuple[int, ...]], row: int, name: str, key: str) -> None:
        if not key:
            return
        if key not in table:  # tuples of numbers cost the garbage collector nothing, lists do
            table[key] = (row,)
            self._forms.setdefault(key, name)
            first, n = key.split(" ", 1)[0], key.count(" ") + 1
            if n > self._longest.get(first, 0):
                self._longest[first] = n
        elif table[key][-1] != row:
            table[key] += (row,)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        counts = [f"{sum(e.level == level for e in self.entries):,} {level}" for level in LEVELS]
        return f"Gazetteer({', '.join(counts)})"

    def names(self, level: str, value: str) -> tuple[str, ...]:
        """Return all names of a place, the usual one first.

        Parameters
        ----------
        level : str
            One of `LEVELS`.
        value : str
            A name or a code of it ("France", "FR"). Of namesakes the first row is meant. A value
            that the gazetteer does not have is its own only name; a blank one has none.
        """
        entry = self._entry(level, value, {})
        return () if entry is None else tuple(n for n in (entry.name, *entry.aliases) if n.strip())

    def mentions(self, text: str) -> list[Mention]:
        """Return the names in a text, in its order; none overlap, longer ones come first."""
        return self._told(text, _apart(self._candidates(_read(text))))

    def _entry(self, level: str, value: object, place: Mapping[str, str]) -> Entry | None:
        """Find what a table calls `value`; `place` has the other levels of the same thing."""
        if level not in LEVELS:
            msg = f"A place has the levels {', '.join(LEVELS)}, not {level!r}."
            raise ValueError(msg)
        if not isinstance(value, str):  # a missing cell of a table is NaN
            return None
        if not name_key(value) and (level, value.strip()) not in self._codes:
            return None
        around = tuple((key, other) for key, other in place.items() if key != level)
        asked = (level, value, around)
        if asked not in self._known:
            rows = self._find(level, value)
            if len(rows) > 1:
                wanted = [self._entry(key, other, {}) for key, other in around]
                rows.sort(key=lambda row: -sum(e in wanted for e in self._above(self.entries[row])))
            self._known[asked] = self.entries[rows[0]] if rows else Entry(level, value.strip())
        return self._known[asked]

    def _find(self, level: str, value: str) -> list[int]:
        """Return the rows of a code or name: those whose usual name it is, then the others."""
        if (row := self._codes.get((level, value.strip()))) is not None:
            return [row]
        key = name_key(value)
        rows = [row for row in self._phrases.get(key, ()) if self.entries[row].level == level]
        return sorted(rows, key=lambda row: self._usual[row] != key)

    def _above(self, entry: Entry) -> tuple[Entry, ...]:
        """Return what an entry lies in, and what that lies in, and on."""
        key = entry.level, entry.parent
        if key not in self._higher:
            levels = LEVELS[LEVELS.index(entry.level) + 1 :] if entry.level in LEVELS else ()
            rows = [row for level in levels for row in self._find(level, entry.parent)[:1]]
            parents = [self.entries[row] for row in rows[:1]]
            self._higher[key] = tuple(e for one in parents for e in (one, *self._above(one)))
        return self._higher[key]

    def _told(self, text: str, found: list[Mention]) -> list[Mention]:
        """Keep those namesakes that the names beside a mention tell, or the words before it."""
        if all(len(mention.entries) == 1 for mention in found) and not any(
            _has(one, "country") and _has(two, "region") for one, two in pairwise(found)
        ):
            return found
        gaps = [words(text[a.end : b.start]) for a, b in pairwise(found)]
        before = [words(text[: found[0].start]), *gaps]
        told = []
        for i, mention in enumerate(found):
            meant = [e for e in mention.entries if e.level == _kind(before[i])]
            if not meant:
                inner, outer = self._beside(found, gaps, i)
                meant = [e for e in inner if e in outer] or inner + outer
            entries = tuple(e for e in mention.entries if any(self._fits(e, m) for m in meant))
            told.append(replace(mention, entries=entries or mention.entries))
        for i in reversed(range(len(gaps))):  # of two towns, the latter first: no list of countries
            if self._is_town(told, gaps, i):
                towns = tuple(e for e in told[i].entries if e.level != "country")
                told[i] = replace(told[i], entries=towns)
        return told

    def _is_town(self, told: list[Mention], gaps: list[list[str]], i: int) -> bool:
        """Tell whether mention i, a country's name, is that of a town: a region elsewhere follows.

        Not in a list of countries or regions, nor behind a place in that country.
        """
        one, two = told[i : i + 2]
        if not (_has(one, "country") and _lies_in(gaps[i]) and self._is_region(two)):
            return False
        around = [o for e in two.entries for o in self._above(e)]
        if any(e in around for e in one.entries):
            return False
        if _joins(gaps, i - 1):
            before = told[i - 1]
            inside = any(o in one.entries for e in before.entries for o in self._above(e))
            if inside or _has(before, "country"):
                return False
        if _joins(gaps, i + 1):
            after = told[i + 2]
            if not any(e in around for e in after.entries):
                return not (_has(after, "country") or _has(after, "region"))
        return True

    def _is_region(self, mention: Mention) -> bool:
        """Tell whether a region is meant: no country, and no city in a region called like it."""
        levels = {e.level for e in mention.entries}
        if "region" not in levels or levels - {"region", "place"} or mention.key in COMMON:
            return False  # also for "Nepal, Northern India": there are regions called Northern
        places = [e for e in mention.entries if e.level == "place"]
        return not any(o in mention.entries for e in places for o in self._above(e))

    def _fits(self, entry: Entry, meant: Entry) -> bool:
        """Tell whether an entry may be the one that is meant: it lies elsewhere in nothing."""
        if entry.level == "country" == meant.level:  # two of a continent are two all the same
            return name_key(entry.name) == name_key(meant.name)
        around = self._above(meant)
        return entry.level == meant.level and all(o in around for o in self._above(entry))

    def _beside(
        self, found: list[Mention], gaps: list[list[str]], i: int
    ) -> tuple[list[Entry], list[Entry]]:
        """Of mention i, what lies in the next name, and what the name before lies in."""
        entries = found[i].entries
        inner: list[Entry] = []
        outer: list[Entry] = []
        if i + 1 < len(found) and _is_address(found, gaps, i):
            around = found[i + 1].entries
            inner = [e for e in entries if any(o in around for o in self._above(e))]
        if i > 0 and _is_address(found, gaps, i - 1):
            higher = {id(o) for e in found[i - 1].entries for o in self._above(e)}
            outer = [e for e in entries if id(e) in higher]
        return inner, outer

    def _candidates(self, text: _Read) -> Iterator[Mention]:
        """Find every name in a text, also those inside others."""
        folded = text.words
        for i, word in enumerate(folded):
            for n in range(min(self._longest.get(word, 0), len(folded) - i), 0, -1):
                key = " ".join(folded[i : i + n]) if n > 1 else word
                if key in self._phrases and (rows := self._meant(text, i, i + n, key)):
                    yield self._mention(text, i, i + n, key, rows)
                if key in self._demonyms and text.is_adjective(i, i + n):
                    yield self._mention(text, i, i + n, key, self._demonyms[key])

    def _meant(self, text: _Read, i: int, end: int, key: str) -> tuple[int, ...]:
        """Of the entries of a name, those that words i to end may mean, by their capitals."""
        rows = self._phrases[key]
        large = tuple(r for r in rows if self.entries[r].level not in ("place", "region"))
        alike = _written_like(text.written[i:end], self._forms[key])
        if key in COMMON:
            if not alike or not text.written[i][0].isupper():
                return ()
            return large if text.starts(i) and not text.stops(end) else rows
        if alike or not text.capitals:
            return rows
        return large if len(key) > 3 else ()  # "us" and "uk" are not so excused

    def _mention(self, text: _Read, i: int, end: int, key: str, rows: tuple[int, ...]) -> Mention:
        entries = tuple(self.entries[row] for row in rows)
        return Mention(text.spans[i][0], text.spans[end - 1][1], key, entries)


def named(
    text: str,
    place: Mapping[str, str],
    gazetteer: Gazetteer,
    *,
    beside: Mapping[str, str] | None = None,
    prompt: str = "",
) -> dict[str, bool | None]:
    """Tell whether a text names a place, its region, its country, its continent.

    A value that the gazetteer does not have (a landmark) is looked for by the name that it has
    here, by the same rules.

    Parameters
    ----------
    text : str
        A model's answer.
    place : mapping
        Levels that are asked for, and what the place is called there: ``{"place": "Lyon",
        "country": "FR"}``. Together they tell namesakes apart.
    gazetteer : Gazetteer
        Names and aliases.
    beside : mapping, optional
        The pair's other place. A name that both have tells nothing, so it is no hit.
    prompt : str
        What the model was asked. Here a name counts inside a longer one too: who is asked about
        Mexico City has read "Mexico".

    Returns
    -------
    dict
        For each level of `place`: is it named? None where nothing can be learnt: the value is
        missing, the same (or of the same usual name) as one of `beside`, or stands in the prompt.
    """
    beside = beside or {}
    wanted = {level: gazetteer._entry(level, value, place) for level, value in place.items()}
    others = [gazetteer._entry(level, value, beside) for level, value in beside.items()]
    unknown = [
        entry
        for entry in (*wanted.values(), *others)
        if entry is not None and not gazetteer._find(entry.level, entry.name)
    ]
    tables = (gazetteer, Gazetteer(dict.fromkeys(unknown))) if unknown else (gazetteer,)
    answer, asked = _read(text), _read(prompt)
    every = _apart(mention for table in tables for mention in table._candidates(answer))
    found = gazetteer._told(text, every)
    told = [mention for table in tables for mention in table._candidates(asked)]
    in_prompt = {entry for mention in told for entry in mention.entries}
    shared = {key for entry in others if entry is not None for key in _keys(entry)}
    result: dict[str, bool | None] = {}
    for level, entry in wanted.items():
        if (
            entry is None
            or entry in in_prompt
            or name_key(entry.name) in shared
            or (entry.stand_ins and any(mention.key in _parts(entry) for mention in told))
        ):
            result[level] = None
        else:
            keys = _keys(entry) - shared
            result[level] = any(m.key in keys and entry in m.entries for m in found)
            if entry.stand_ins and not result[level]:
                parts = _parts(entry) - shared
                result[level] = any(m.key in parts and m.entries for m in found)
    return result


def words(text: str) -> list[str]:
    """Return the words and marks of a text, accents and case folded, hyphens left out.

    "St." is "saint", "Mt." "mount"; the full stops of "U.S." and "D. C." are left out too.
    """
    return _read(text).words


def name_key(name: str) -> str:
    """Return the words of a name, as `words` has them, joined by blanks; "" without letters."""
    plain = _plain(name)
    if plain.isalpha() and plain.isascii():  # most names: ten times as fast
        return _SHORT.get(plain, plain)
    if not any(map(str.isalpha, plain)):
        return ""
    if _SIMPLE.fullmatch(plain):
        return " ".join([_SHORT.get(word, word) for word in plain.replace("-", " ").split()])
    return " ".join(words(name))


@dataclass(frozen=True, slots=True)
class _Read:
    """A text as words and marks."""

    words: list[str]
    """Folded."""
    written: list[str]
    spans: list[tuple[int, int]]
    capitals: bool
    """Are there any?"""

    def starts(self, i: int) -> bool:
        """Tell whether word i begins a sentence."""
        return i == 0 or self.written[i - 1] in _STARTS

    def stops(self, end: int) -> bool:
        """Tell whether a mark or nothing follows the words before `end`."""
        return end == len(self.words) or not self.written[end][0].isalnum()

    def is_adjective(self, i: int, end: int) -> bool:
        """Tell whether words i to end, with a capital, stand before a word for a place."""
        return (
            end < len(self.words)
            and self.words[end] in PLACE_WORDS
            and (self.written[i][0].isupper() or not self.capitals)
        )


def _read(text: str) -> _Read:
    folded: list[str] = []
    written: list[str] = []
    spans: list[tuple[int, int]] = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        fold = _fold(token)
        if fold in _SOFT and not (fold in _DASHES and _is_apart(text, *match.span())):
            continue
        if not fold.strip(" "):
            continue
        if token == "." and written and _abbreviates(written[-1]):
            continue
        folded.append(fold)
        written.append(token)
        spans.append(match.span())
    return _Read(folded, written, spans, text != text.lower())


@lru_cache(maxsize=1 << 16)
def _fold(token: str) -> str:
    folded = _plain(token)
    return _SHORT.get(folded, folded)


def _plain(text: str) -> str:
    if text.isascii():
        return text.lower()
    parts = unicodedata.normalize("NFKD", text.casefold())
    return _MARKS.sub("", parts).translate(_PLAIN)


def _is_apart(text: str, start: int, end: int) -> bool:
    """Tell whether blanks stand on both sides: of a dash that joins no words."""
    return not text[max(start - 1, 0) : start].strip() and not text[end : end + 1].strip()


def _abbreviates(word: str) -> bool:
    return word in ("St", "Ste", "Mt", "Ft") or (len(word) == 1 and word.isalpha())


def _written_like(written: list[str], form: str) -> bool:
    """Tell whether words have the capitals that a table gives them."""
    patterns = _read(form).written
    if len(patterns) != len(written):  # a ligature that folds into several words
        return False
    for word, pattern in zip(written, patterns, strict=True):
        if pattern.isupper() and 1 < len(pattern) <= 3:
            if not word.isupper():
                return False
        elif pattern[0].isupper() and not word[0].isupper():
            return False
    return True


def _apart(candidates: Iterable[Mention]) -> list[Mention]:
    """Keep the longest of the mentions that overlap; join what lies on the same words."""
    spans: dict[tuple[int, int], Mention] = {}
    for mention in candidates:
        span = (mention.start, mention.end)
        if span in spans:
            both = dict.fromkeys((*spans[span].entries, *mention.entries))
            mention = Mention(mention.start, mention.end, mention.key, tuple(both))
        spans[span] = mention
    kept: list[Mention] = []
    for mention in sorted(spans.values(), key=lambda m: (m.start - m.end, m.start)):
        if all(mention.end <= other.start or mention.start >= other.end for other in kept):
            kept.append(mention)
    return sorted(kept, key=lambda m: m.start)


def _is_address(found: list[Mention], gaps: list[list[str]], i: int) -> bool:
    """Tell whether mentions i and i + 1 may be a place and what it lies in.

    They are not where they stand in a list of names that could all be of one level.
    """
    if not LINKS.issuperset(gaps[i]):
        return False
    one, two = ({e.level for e in mention.entries} for mention in found[i : i + 2])
    outer = [j for j, gap in ((i - 1, i - 1), (i + 2, i + 1)) if _joins(gaps, gap)]
    return not any(e.level in one & two for j in outer for e in found[j].entries)


def _lies_in(gap: list[str]) -> bool:
    """Tell whether the words between two names say that the former, a town, lies in the latter."""
    if not LINKS.issuperset(gap):
        return False
    if "city" in gap or "town" in gap:
        return True
    return gap[:1] in ([","], ["("]) and "of" not in gap and "country" not in gap


def _has(mention: Mention, level: str) -> bool:
    return any(e.level == level for e in mention.entries)


def _joins(gaps: list[list[str]], i: int) -> bool:
    return 0 <= i < len(gaps) and bool(gaps[i]) and _JOINS.issuperset(gaps[i])


def _kind(before: list[str]) -> str:
    """Return the level that the words before a name say: "the state of" is of a region."""
    *_, article, kind, of = ("", "", "", *before)
    return _KINDS.get(kind, "") if of == "of" and article in ("the", "", ".") else ""


@lru_cache(maxsize=1 << 12)
def _keys(entry: Entry) -> frozenset[str]:
    """All that a text may call it, folded."""
    names = (entry.name, *entry.aliases, *entry.demonyms)
    return frozenset(key for name in names if (key := name_key(name)))


@lru_cache(maxsize=1 << 12)
def _parts(entry: Entry) -> frozenset[str]:
    return frozenset(map(name_key, entry.stand_ins))


def _check(row: int, entry: Entry) -> None:
    if entry.level not in (*LEVELS, OTHER):
        msg = (
            f"Row {row} of the gazetteer ({entry.name!r}) has the level {entry.level!r}; "
            f"levels are {', '.join((*LEVELS, OTHER))}."
        )
        raise ValueError(msg)
    if not entry.name.strip():
        msg = f"Row {row} of the gazetteer, a {entry.level}, has no name."
        raise ValueError(msg)
    for names in ("aliases", "codes", "demonyms", "stand_ins"):
        if isinstance(getattr(entry, names), str):
            msg = f"Row {row} of the gazetteer ({entry.name!r}): {names} must be a tuple of names."
            raise TypeError(msg)
