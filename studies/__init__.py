"""The lecture's claims, one short experiment each."""

import engine  # noqa: F401  before torch
