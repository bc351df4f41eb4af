"""Joins by KMS that stand."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Makes the table, where a program between two revisions has not."""
    if sa.inspect(op.get_bind()).has_table("kms_joins"):
        return
    op.create_table(
        "kms_joins",
        sa.Column("agreement", sa.LargeBinary(), nullable=False),
        sa.Column("party", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("number", WHOLE, nullable=False),
        sa.Column("cose", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", WHOLE, nullable=False),
        sa.ForeignKeyConstraint(["agreement"], ["agreements.digest"]),
        sa.PrimaryKeyConstraint("agreement", "party"),
    )
