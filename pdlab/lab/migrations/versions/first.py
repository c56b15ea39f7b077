"""Jobs with their tags, and uploaded files."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("seeds", sa.Integer, nullable=False),
        sa.Column("asked", sa.Text, nullable=False),
        sa.Column("submitted_s", sa.Float, nullable=False),
        sa.Column("started_s", sa.Float),
        sa.Column("ended_s", sa.Float),
        sa.Column("deaths", sa.Integer, nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        sa.Column("requests", sa.BigInteger),
        sa.Column("slo_attainment", sa.Float),
        sa.Column("goodput_rps", sa.Float),
        sa.Column("ttft_p99_s", sa.Float),
        sa.Column("tpot_p99_s", sa.Float),
    )
    op.create_index("jobs_by_state", "jobs", ["state", "submitted_s"])
    op.create_index("jobs_by_kind", "jobs", ["kind", "submitted_s"])
    op.create_table(
        "tags",
        sa.Column("job", sa.String(16), primary_key=True),
        sa.Column("tag", sa.String(64), primary_key=True),
    )
    op.create_table(
        "uploads",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("added_s", sa.Float, nullable=False),
    )


def downgrade() -> None:
    for table in ("uploads", "tags", "jobs"):
        op.drop_table(table)
