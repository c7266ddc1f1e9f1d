# What demo-training-prepare.sh and demo-training-run.sh share. Each name can be set from outside:
#
#   DATA=data/my N_LAYER=2 N_EMBD=128 CTX_LEN=128 ACCELERATOR=cpu sh demo-training-prepare.sh
#
# The defaults are those of RWKV-LM's MiniPile demo. Its length, prime and count of mini-epochs belong
# to that data: with other DATA they are 0, that is worked out from the files (one pass, the largest
# prime that fits).

: "${DATA:=data/minipile}"       # prefix of the token files
: "${N_LAYER:=12}" "${N_EMBD:=768}" "${HEAD_SIZE:=64}"
: "${MODEL_TYPE:=x070}"
: "${CTX_LEN:=512}"
if [ "$DATA" = data/minipile ] && [ "$CTX_LEN" = 512 ]; then
  : "${MAGIC_PRIME:=2926181}"
fi
if [ "$DATA" = data/minipile ]; then
  : "${EXIT_TOKENS:=1498226207}" "${VOCAB_SIZE:=65536}" "${EPOCH_COUNT:=999999}"
fi
: "${EXIT_TOKENS:=0}" "${MAGIC_PRIME:=0}" "${EPOCH_COUNT:=0}"
: "${VOCAB_SIZE:=0}"             # 0: of the tokenizer beside the data, else 65536
: "${PROJ_DIR:=out/L$N_LAYER-D$N_EMBD-$MODEL_TYPE}"
: "${ACCELERATOR:=gpu}" "${DEVICES:=1}" "${NODES:=1}"
: "${PRECISION:=bf16}" "${STRATEGY:=deepspeed_stage_2}"
: "${M_BSZ:=16}" "${LR_INIT:=6e-4}" "${LR_FINAL:=6e-5}" "${GRAD_CP:=1}"
: "${EPOCH_STEPS:=}"             # empty: 40320 windows per mini-epoch
: "${EPOCH_SAVE:=10}"
: "${WANDB:=}"                   # wandb project; empty: none

HERE=$(dirname "$0")
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  if [ -x "$HERE/.venv/bin/python" ]; then PYTHON="$HERE/.venv/bin/python"; fi
fi
