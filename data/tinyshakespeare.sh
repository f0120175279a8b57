#!/bin/sh
# Downloads tiny Shakespeare, a text of 1,115,394 bytes (338,025 tokens of GPT-2), and with --shards also
# llm.c's two token files of it, which need no tokenizer.
#
#   sh data/tinyshakespeare.sh [--shards] [FOLDER]     FOLDER is tinyshakespeare if not given
#
# Then: ./train_gpt2 --init gpt2 --train tinyshakespeare/tinyshakespeare.txt --out tuned
# DATA_MIRROR, a folder or URL with files of the same names, is tried first.
set -u
here=$(dirname "$0")
shards=
if [ "${1:-}" = --shards ]; then
    shards=1
    shift
fi
folder=${1:-tinyshakespeare}
case $folder in
-*)
    echo "data/tinyshakespeare.sh: $folder: expected [--shards] [FOLDER]" >&2
    exit 2
    ;;
esac
mirror=${DATA_MIRROR:-}

# get FILE SHA256 URL
get() {
    sh "$here/download.sh" -s "$2" "$folder/$1" ${mirror:+"${mirror%/}/$1"} "$3" || exit 1
}

get tinyshakespeare.txt 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed \
    https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
echo "338,025 tokens with GPT-2's tokenizer"
if [ -n "$shards" ]; then
    home=https://huggingface.co/datasets/karpathy/llmc-starter-pack/resolve/main
    get tiny_shakespeare_train.bin 8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8 \
        $home/tiny_shakespeare_train.bin
    get tiny_shakespeare_val.bin fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62 \
        $home/tiny_shakespeare_val.bin
    echo "305,260 tokens to train on and 32,768 to validate, with an <|endoftext|> before every paragraph"
fi
