#!/usr/bin/env bash
# Runs the tests that rwkv_trainer publishes, one file after the other; all tests: make test.
# PYTHON names the interpreter (python).
set -eu
cd "$(dirname "$0")"
for test in tokenizer data_converter pipeline; do
  "${PYTHON:-python}" "tests/test_${test}_simple.py"
done
