"""Texts whose personal data are marked, [[KIND|value]]; all of them are made up or published examples.

Keys and tokens are written in two pieces, so that no scanner takes this file for a leak.
"""

from __future__ import annotations

import re

LABELLED = [
    # English
    "Write to [[EMAIL|anna.schmidt+news@example.co.uk]] or [[EMAIL|o'brien_99@mail.example.org]].",
    "From: Bob <[[EMAIL|bob@example.com]]>, Cc: [[EMAIL|x@y-z.example.museum]];",
    "Call [[PHONE|+44 20 7946 0958]], [[PHONE|+1 (415) 555-0132]] or [[PHONE|+49-30-901820]] today.",
    "Office: [[PHONE|(212) 555-0187]]; mobile: [[PHONE|917-555-0143]]; fax [[PHONE|646.555.0111]].",
    "From abroad dial [[PHONE|0049 30 901820]], then wait 20 seconds.",
    "Visa [[CREDIT_CARD|4111 1111 1111 1111]], exp 09/27, CVV 123.",
    "Cards: [[CREDIT_CARD|5555555555554444]], [[CREDIT_CARD|3782-822463-10005]], [[CREDIT_CARD|6011000990139424]].",
    "Pay to [[IBAN|DE89 3704 0044 0532 0130 00]] BIC COBADEFFXXX.",
    "IBANs [[IBAN|GB82WEST12345698765432]], [[IBAN|FR14 2004 1010 0505 0001 3M02 606]] and [[IBAN|NO93 8601 1117 947]].",
    "His SSN is [[US_SSN|123-45-6789]], hers [[US_SSN|078-05-1120]].",
    "Login from [[IP_ADDRESS|203.0.113.77]] and [[IP_ADDRESS|2001:db8:85a3::8a2e:370:7334]].",
    "Blocked [[IP_ADDRESS|198.51.100.4]]:443, [[IP_ADDRESS|fe80::1ff:fe23:4567:890a]]",
    "git clone https://[[CREDENTIALS|alice:s3cret]]@git.example.com/repo.git",
    "postgres://[[CREDENTIALS|admin:pa55word!]]@db.example.net:5432/app",
    f"aws_access_key_id = [[SECRET|{'AKIA'}IOSFODNN7EXAMPLE]]",
    f"Authorization: Bearer [[SECRET|{'eyJ'}hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N]]",
    f"export TOKEN=[[SECRET|{'ghp_'}16C7e42F292c6912E7710c838347Ae178B4a]]",
    'config = {"password": "[[SECRET|hunter2hunter2]]", "user": "bob"}',
    "She was born on [[BIRTH_DATE|3 March 1985]] in Leeds.",
    "Date of birth: [[BIRTH_DATE|03/05/1985]]. DOB: [[BIRTH_DATE|1990-12-01]]",
    "Birthday: [[BIRTH_DATE|July 4th, 1976]]; the party is on 5 July 2026.",
    f"[[PRIVATE_KEY|-----BEGIN {'RSA '}PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEowIBAAKCAQEA7\n-----END RSA PRIVATE KEY-----]]\nend",
    # Chinese
    "我的邮箱是[[EMAIL|zhang.san@example.com.cn]]，请联系我。",
    "手机：[[PHONE|13812345678]]，备用[[PHONE|159 8765 4321]]、[[PHONE|186-0000-1234]]。",
    "请拨打[[PHONE|+86 138 1234 5678]]或[[PHONE|010-62771234]]，总机[[PHONE|(0755)26712345]]。",
    "全角号码[[PHONE|１３９１２３４５６７８]]，邮箱[[EMAIL|ｌｉｓｉ＠ｅｘａｍｐｌｅ．ｃｏｍ]]。",
    "身份证号[[CHINESE_ID|11010519491231002X]]，另一位是[[CHINESE_ID|440524188001010014]]。",
    "银行卡[[CREDIT_CARD|6222 0212 3456 7894]]，服务器[[IP_ADDRESS|203.0.113.9]]。",
    "出生日期：[[BIRTH_DATE|1985年3月5日]]，籍贯北京。他[[BIRTH_DATE|1990年12月1日]]出生。",
    "密码：[[SECRET|abc123456]]，不要告诉别人。生于[[BIRTH_DATE|1978-06-30]]。",
    # Of a kind that is looked for, in a form that is not
    "Dial [[PHONE|8613812345678]] or [[PHONE|1.800.555.0199]]; born [[BIRTH_DATE|in the spring of 1985]].",
    "卡号[[CREDIT_CARD|6222.0212.3456.7894]]，电话[[PHONE|0086-13812345678]]，[[BIRTH_DATE|八五年三月五日]]出生。",
    # Nothing personal
    "Version 1.2.3.4-beta of v10.0.0.1rc, section 3.1.4.1.5, std::add(a, b), a::b, 12:30:45.",
    "The ISBN is 978-3-16-148410-0, the order 4111 1111 1111 1112, pi 3.1415926535897932.",
    "Released on 3 March 1985; 10-12-2020; 2020-10-12. 100-200-3000 pieces of 000-12-3456.",
    "@handle wrote at 5 p.m. to user@localhost; see https://example.com/@user and a@b.",
    "password: required. token = tokens, secret: the garden. See DE89 and GB82 WEST.",
    "今天温度12.5度，2008年8月8日开幕，总数12345678901，编号110105194912310021。",
    "localhost is 127.0.0.1, 0.0.0.0 or ::1; 256.300.1.1 is nobody's. 1 2 3 4 5 6 7 8 9 10 11 12 13",
    "-----BEGIN PRIVATE KEY----- begins a key, and -----BEGIN PUBLIC KEY----- none.",
]  # fmt: skip

# What is personal and is not found, by what it is: docs/privacy.md has this list.
NOT_FOUND = {
    "names": "Maria Gonzalez met 王小明 and Dr. Smith.",
    "postal addresses": "12 Baker Street, London NW1 6XE；北京市海淀区中关村大街27号",
    "spelt-out and disguised addresses": "bob (at) example dot com, bob@example, bob@例子.中国",
    "national telephone numbers but those of the US and China": "020 7946 0958, 01 42 68 53 00",
    "numbers without separators": "4155550132 and 123456789",
    "identity numbers of other countries": "AB123456C, passport C01X00T47",
    "dates of birth without a word that says so": "Anna (3 March 1985)",
    "passwords in prose": "my password is correct horse battery staple",
    "health, religion, opinions": "He has diabetes and votes for the Greens.",
    "what spans two lines": "bob@exam-\nple.com",
}

_MARK = re.compile(r"\[\[(\w+)\|(.*?)\]\]", re.DOTALL)


def unmarked(text: str) -> tuple[str, list[tuple[int, int, str]]]:
    """The text without marks, and start, end and kind of each value."""
    plain, spans, done = "", [], 0
    for mark in _MARK.finditer(text):
        plain += text[done : mark.start()]
        spans.append((len(plain), len(plain) + len(mark[2]), mark[1]))
        plain, done = plain + mark[2], mark.end()
    return plain + text[done:], spans
