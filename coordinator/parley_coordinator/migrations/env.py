"""What Alembic runs: the steps, on the connection that the caller gave, in its transaction."""

from __future__ import annotations

from alembic import context

from parley_coordinator.models import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
