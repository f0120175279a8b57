#!/bin/sh
# Downloads a GPT-2 of OpenAI as a model folder: config.json, model.safetensors, vocab.json, merges.txt,
# generation_config.json. An interrupted download goes on when the command is given again.
#
#   sh data/gpt2.sh [gpt2|gpt2-medium|gpt2-large|gpt2-xl] [FOLDER]     also: make gpt2, make gpt2-xl, ...
#
# Then: ./train_gpt2 --init gpt2 --generate 100 --prompt "Once upon a time"
# DATA_MIRROR, a folder or URL, is tried first: DATA_MIRROR/gpt2/config.json, then DATA_MIRROR/config.json.
set -u
here=$(dirname "$0")
model=${1:-gpt2}
folder=${2:-$model}
case $model in
gpt2) layers=12 parameters="124,439,808" ;;
gpt2-medium) layers=24 parameters="354,823,168" ;;
gpt2-large) layers=36 parameters="774,030,080" ;;
gpt2-xl) layers=48 parameters="1,557,611,200" ;;
*)
    echo "data/gpt2.sh: $model: expected gpt2, gpt2-medium, gpt2-large or gpt2-xl" >&2
    exit 2
    ;;
esac
home=https://huggingface.co/openai-community/$model/resolve/main
mirror=${DATA_MIRROR:-}
mirror=${mirror%/}

# get FILE [SHA256 [OTHER_NAME]]: OTHER_NAME is what OpenAI's own release, and so a mirror, may call it.
get() {
    name=$1 sha=${2:-} other=${3:-$1}
    set -- "$home/$name"
    [ -z "$mirror" ] || set -- "$mirror/$model/$name" "$mirror/$name" "$mirror/$other" "$home/$name"
    sh "$here/download.sh" ${sha:+-s "$sha"} "$folder/$name" "$@" || exit 1
}

get config.json
if ! grep -Eq "\"n_layer\": *$layers([^0-9]|\$)" "$folder/config.json"; then
    rm -f "$folder/config.json"
    echo "data/gpt2.sh: the config.json found is not that of $model: n_layer $layers expected" >&2
    exit 1
fi
get vocab.json 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783 encoder.json
get merges.txt 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5 vocab.bpe
get generation_config.json
get model.safetensors
if [ "$(dd if="$folder/model.safetensors" bs=1 skip=8 count=1 2>/dev/null)" != "{" ]; then
    rm -f "$folder/model.safetensors"
    echo "data/gpt2.sh: what came as model.safetensors is no safetensors file; it was removed" >&2
    exit 1
fi
echo "$folder: $model, $layers layers, $parameters parameters, 50,257 tokens in the vocabulary"
