"""The lab's tables, as the newest migration leaves them. A test holds the two together."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData()
FIGURES = ("slo_attainment", "goodput_rps", "ttft_p99_s", "tpot_p99_s")  # of a summary, by which runs are sorted

JOBS = Table(
    "jobs",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("name", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("policy", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("seeds", Integer, nullable=False),
    Column("asked", Text, nullable=False),  # JSON: the whole order, from which it can be run anew
    Column("submitted_s", Float, nullable=False),  # Unix time, as the next two
    Column("started_s", Float),
    Column("ended_s", Float),
    Column("deaths", Integer, nullable=False),
    Column("failure", Text, nullable=False),
    Column("requests", BigInteger),
    *(Column(name, Float) for name in FIGURES),
)
Index("jobs_by_state", JOBS.c.state, JOBS.c.submitted_s)
Index("jobs_by_kind", JOBS.c.kind, JOBS.c.submitted_s)

TAGS = Table("tags", METADATA, Column("job", String(16), primary_key=True), Column("tag", String(64), primary_key=True))

UPLOADS = Table(
    "uploads",
    METADATA,
    Column("name", String(128), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("added_s", Float, nullable=False),
)
