#!/usr/bin/env bash
# Installs this checkout in .venv and runs the demo; arguments go to `qtuning demo`.
source "$(dirname "$0")/environment.sh"
prepare demo
exec .venv/bin/qtuning demo "$@"
