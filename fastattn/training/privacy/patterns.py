"""Which personal data have a form that can be found: rules, each a pattern and a check.

A pattern reads each character of a text a bounded number of times: its repetitions are bounded, or
begin where no other one of the same characters can. So hostile texts take no longer than others.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

# "LENGTH:COUNTRIES" of the registry of IBANs (ISO 13616).
_IBANS = (
    "15:NO 16:BE 18:DK,FI,FO,GL,NL 19:MK,SI 20:AT,BA,EE,KZ,LT,LU,XK 21:CH,HR,LI,LV "
    "22:BG,BH,CR,DE,GB,GE,IE,ME,RS,VA 23:AE,GI,IL,IQ,TL 24:AD,CZ,ES,MD,PK,RO,SA,SE,SK,TN,VG "
    "25:PT,ST 26:IS,TR 27:FR,GR,IT,MC,MR,SM 28:AL,AZ,BY,CY,DO,GT,HU,LB,PL,SV 29:BR,EG,PS,QA,UA "
    "30:JO,KW,MU 31:MT,SC 32:LC"
)
IBAN_LENGTHS = {
    country: int(length)
    for length, countries in (entry.split(":") for entry in _IBANS.split())
    for country in countries.split(",")
}


def plain(text: str) -> str:
    """`text` with full-width forms and the decimal digits of all scripts in ASCII, each character
    in its place."""
    return text if text.isascii() else text.translate(_plain())


@functools.cache
def _plain() -> dict[int, int]:
    forms = {0x3000: 0x20} | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
    digits = (code for code in range(0x80, 0x20000) if chr(code).isdecimal())
    return forms | {code: ord("0") + unicodedata.decimal(chr(code)) for code in digits}


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812."""
    doubled = [int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def card(found: str) -> int:
    digits = _digits(found)
    issued = "3" <= digits[0] <= "6" or "22" <= digits[:2] <= "27"
    return len(found) * (issued and luhn(digits) and len(set(digits)) > 1)


def iban(found: str) -> int:
    """The characters that are the account's: what follows may be another word in capitals."""
    places = [place for place, character in enumerate(found) if character != " "]
    length = IBAN_LENGTHS.get(found[:2], len(places) + 1)
    if length > len(places):
        return 0
    end = places[length - 1] + 1
    number = found[:end].replace(" ", "")
    valid = int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1
    return end * (valid and not found[end : end + 1].isalnum())


def phone(found: str) -> int:
    """An international number has 8 to 15 digits (ITU-T E.164)."""
    return len(found) * (8 <= len(_digits(found).removeprefix("00")) <= 15)


def chinese_id(found: str) -> int:
    """Date of birth and check character of GB 11643."""
    try:
        born = datetime.date(int(found[6:10]), int(found[10:12]), int(found[12:14]))
    except ValueError:
        return 0
    remainder = sum(int(digit) * 2 ** (17 - i) for i, digit in enumerate(found[:17])) % 11
    return 18 * (born.year >= 1880 and "10X98765432"[remainder] == found[17].upper())


def ip_address(found: str) -> int:
    if found.endswith(":") and not found.endswith("::"):
        found = found[:-1]  # a sentence goes on
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return 0
    groups = [group for group in found.split(":") if group]
    # Shorter ones are names in programs ("a::b"), too.
    long = address.version == 4 or len(groups) > 2 or len(groups[:1] and groups[0]) == 4
    return len(found) * (long and not (address.is_loopback or address.is_unspecified))


def _digits(found: str) -> str:
    return re.sub("[^0-9]", "", found)


@dataclass(frozen=True)
class Rule:
    """A form of personal data.

    Attributes:
        kind: the placeholder's word.
        pattern: of a text that `plain` made; what is found is its group "value", if it has one.
        check: how many characters of a match are the find, from its start; 0 for none.
    """

    kind: str
    pattern: re.Pattern[str]
    check: Callable[[str], int] = len


def _rule(kind: str, pattern: str, check: Callable[[str], int] = len) -> Rule:
    # ASCII: a Chinese character beside a number is no part of it.
    return Rule(kind, re.compile(pattern, re.ASCII), check)


_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6}\.?"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = (
    r"\d{4} ?[-/.年] ?\d{1,2} ?[-/.月] ?\d{1,2} ?日?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}"
    rf"|{_DAY} {_MONTH},? \d{{4}}|{_MONTH} {_DAY},? \d{{4}}"
)
_BORN = r"born|date of birth|d\.?o\.?b\.?|birth ?da(?:te|y)|出生日期|出生年月|出生于|生于|生日"
_NAMED = "password|passwd|secret|token|api[_-]?key|access[_-]?key|密码|口令"
_KEY = "(?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----"

RULES = (
    _rule("PRIVATE_KEY", f"-----BEGIN {_KEY}[^-]*(?:-(?!-)[^-]*)*-----END {_KEY}"),
    # One that is cut off: its long lines.
    _rule(
        "PRIVATE_KEY", rf"-----BEGIN {_KEY}(?:(?:\s|\\n){{0,4}}[A-Za-z0-9+/=]{{40,128}}){{1,999}}"
    ),
    _rule("CREDENTIALS", r'(?<=://)[^\s/@:<>"]{1,64}(?::[^\s/@<>"]{0,128})?(?=@)'),
    _rule(
        "EMAIL",
        "[A-Za-z0-9_%+'][A-Za-z0-9._%+'-]{0,63}@"
        r"(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}",
    ),
    _rule("SECRET", r"(?<!\w)(?:AKIA|ASIA)[A-Z0-9]{16}(?!\w)"),
    _rule("SECRET", r"(?<!\w)AIza[\w-]{35}(?![\w-])"),
    _rule("SECRET", r"(?<![\w-])(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abprs]-)[\w-]{16,}"),
    _rule("SECRET", r"(?<![\w-])eyJ[\w-]+\.eyJ[\w-]+\.[\w-]*"),
    # Of a named one at least six characters with a digit among them.
    _rule(
        "SECRET",
        rf"(?i:{_NAMED})[\"']?\s{{0,2}}[:=]\s{{0,2}}[\"']?"
        r"(?P<value>(?=[^\s\"'<>,;。]{0,255}\d)[^\s\"'<>,;。]{6,256})",
    ),
    _rule("CHINESE_ID", r"(?<!\d)[1-9]\d{16}[\dXx](?!\w)", chinese_id),
    _rule("IBAN", r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?", iban),
    _rule("CREDIT_CARD", r"(?<!\d)\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?!\d)", card),
    _rule("CREDIT_CARD", r"(?<!\d)3\d{3}[ -]\d{6}[ -]\d{5}(?!\d)", card),
    _rule("CREDIT_CARD", r"(?<![\d.])\d{13,19}(?!\d)", card),
    _rule("US_SSN", r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])"),
    _rule("PHONE", r"(?<![\w+])\+[1-9](?:[ .()/-]{0,3}\d){7,14}(?!\d)", phone),
    _rule("PHONE", r"(?<!\w)00[1-9]\d{0,2}[ -](?:[ .()/-]{0,3}\d){6,13}(?!\d)", phone),
    _rule("PHONE", r"(?<!\d)(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])[2-9]\d\d[-. ]\d{4}(?!\d)"),
    _rule("PHONE", r"(?<![\d.])1[3-9]\d([ -]?)\d{4}\1\d{4}(?!\d)"),
    _rule("PHONE", r"(?<!\d)(?:0\d{2,3}[- ]|\(0\d{2,3}\) ?)\d{7,8}(?!\d)"),
    _rule("IP_ADDRESS", r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)", ip_address),
    _rule("IP_ADDRESS", r"(?<![\w:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,40}(?![\w:])", ip_address),
    _rule(
        "BIRTH_DATE",
        f"(?<![A-Za-z])(?i:{_BORN})(?: on| in)?[\"']?[: ]{{0,3}}(?:is |为|是)?[\"']?"
        f"(?P<value>{_DATE})",
    ),
    _rule("BIRTH_DATE", rf"(?<!\d)(?P<value>{_DATE}) ?(?:出生|生人)"),
)
KINDS = tuple(dict.fromkeys(rule.kind for rule in RULES))
