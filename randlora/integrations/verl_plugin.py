"""What verl imports as a plugin: the engine, if ``VERL_ENGINE_VENDOR`` names it, else nothing.

verl logs the errors of its plugins at debug only, and goes on with its own engine.
"""

import os

if os.environ.get("VERL_ENGINE_VENDOR") == "randlora":
    try:
        import randlora.integrations.verl  # noqa: F401  # which registers it
    except Exception as error:
        raise SystemExit(f"VERL_ENGINE_VENDOR=randlora, but its engine cannot be imported: {error!r}") from error
