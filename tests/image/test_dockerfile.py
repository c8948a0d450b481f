"""The reader of Dockerfiles: what it makes of each instruction, and that it passes over none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.image.dockerfile import NotUnderstoodError, read

TEXT = """# a comment
ARG BASE=debian:12
FROM ${BASE}
ARG WORD="two words"
ENV NAME=value OTHER=1
ENV PLACE=/opt/$NAME
# hadolint ignore=DL1
RUN one \\
    # a comment inside
    && two "${WORD}"
WORKDIR ${PLACE}
COPY a b ./
USER 10001
RUN three
HEALTHCHECK --interval=5m CMD ["check", "it"]
CMD ["start"]
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_text(text: str) -> Path:
        (tmp_path / "Dockerfile").write_text(text)
        return tmp_path / "Dockerfile"

    return write_text


def test_an_image_is_what_its_lines_say(write) -> None:
    image = read(write(TEXT))
    assert image.base == "debian:12"
    assert [(step.word, step.text.split(), step.user, step.workdir) for step in image.steps] == [
        ("RUN", ["one", "&&", "two", '"${WORD}"'], "root", "/"),
        ("COPY", ["a", "b", "./"], "root", "/opt/value"),
        ("RUN", ["three"], "10001", "/opt/value"),
    ]
    assert image.steps[0].environment == {
        "WORD": "two words",
        "NAME": "value",
        "OTHER": "1",
        "PLACE": "/opt/value",
    }
    assert image.environment == {"NAME": "value", "OTHER": "1", "PLACE": "/opt/value"}
    assert (image.healthcheck, image.command) == (["check", "it"], ["start"])


def test_arguments_replace_defaults(write) -> None:
    image = read(write(TEXT), {"BASE": "debian:13", "WORD": "one"})
    assert image.base == "debian:13"
    assert image.steps[0].environment["WORD"] == "one"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\nCMD [", "\nVOLUME [", ":16: VOLUME: not known here"),
        ("COPY a", "COPY --from=other a", "COPY: only the plain form is known"),
        ("RUN three", 'RUN ["three"]', "RUN: only the plain form is known"),
        ('CMD ["start"]', "CMD start", "CMD: "),
        ("${PLACE}", "${ABSENT}", "WORKDIR: 'ABSENT'"),
        ("NAME=value", "NAME value", "ENV: written without ="),
    ],
)
def test_what_is_not_known_is_refused(write, old: str, new: str, message: str) -> None:
    with pytest.raises(NotUnderstoodError) as caught:
        read(write(TEXT.replace(old, new)))
    assert message in str(caught.value)


def test_an_argument_that_the_file_does_not_have_is_refused(write) -> None:
    with pytest.raises(NotUnderstoodError, match="it has no ARG TROCH"):
        read(write(TEXT), {"TROCH": "x"})
