#!/bin/sh
# Downloads one file, whole or not at all: goes on where an interrupted download stopped (FILE.part), checks
# the sha256, and only then gives the file its name. Needs curl or wget.
#
#   sh data/download.sh URL [FILE]                    any public file, as text or JSONL of Hugging Face
#   sh data/download.sh [-s SHA256] FILE SOURCE...    sources are URLs or paths; the first that works is taken
#
# DATA_MIRROR, a folder or URL, is looked into for a file of the URL's base name before the URL itself.
set -u

fail() {
    echo "data/download.sh: $*" >&2
    exit 1
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# Adds the rest of URL $1 to $part. A part that the server cannot go on from is fetched anew.
fetch() {
    if command -v curl >/dev/null; then
        code=$(curl -fsSL -C - --connect-timeout 20 -w '%{http_code}' -o "$part" "$1" 2>"$part.log")
        status=$?
        if [ -s "$part" ] && { [ $status = 33 ] || [ "$code" = 416 ]; }; then
            curl -fsSL --connect-timeout 20 -o "$part" "$1" 2>"$part.log"
            status=$?
        fi
    elif command -v wget >/dev/null; then
        wget -nv -c -T 60 -t 2 -O "$part" "$1" 2>"$part.log"
        status=$?
    else
        fail "curl or wget is needed to download $file: install one of them"
    fi
    why="$(grep -v '^$' "$part.log" | tail -n 1)"
    rm -f "$part.log"
    return $status
}

wanted=
if [ "${1:-}" = -s ]; then
    wanted=${2:-}
    shift 2
fi
case ${1:-} in
"" | -*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
http://* | https://*)
    url=$(echo "$1" | sed '/huggingface.co/s,/blob/,/resolve/,')
    base=$(basename "${url%%\?*}")
    file=${2:-$base}
    set -- "$url"
    [ -z "${DATA_MIRROR:-}" ] || set -- "${DATA_MIRROR%/}/$base" "$@"
    ;;
*)
    file=$1
    shift
    [ $# -gt 0 ] || fail "$file: from where? a source is missing"
    ;;
esac
part=$file.part

if [ -f "$file" ] && [ -n "$wanted" ] && [ "$(sha256 "$file")" != "$wanted" ]; then
    fail "$file: is there, but its sha256 is not $wanted; remove it to download it again"
fi
if [ ! -f "$file" ]; then
    mkdir -p "$(dirname "$file")" || exit 1
    done= why="no such file in DATA_MIRROR"
    for source in "$@"; do
        case $source in
        http://* | https://*) fetch "$source" && done=1 ;;
        *) [ -f "$source" ] && { cat "$source" >"$part" || fail "$file: could not be copied"; } && done=1 ;;
        esac
        [ -n "$done" ] && break
    done
    if [ -z "$done" ]; then
        [ -s "$part" ] || rm -f "$part"
        fail "$file: not downloaded from $source: $why$([ -f "$part" ] && echo "; again goes on from there" ||
            echo "; offline, set DATA_MIRROR to a folder or URL that has it")"
    fi
    if [ -n "$wanted" ] && [ "$(sha256 "$part")" != "$wanted" ]; then
        found=$(sha256 "$part")
        rm -f "$part"
        fail "$file: what $source has is not it: sha256 $found, $wanted expected"
    fi
    mv "$part" "$file" || exit 1
fi
echo "$file: $(wc -c <"$file" | tr -d ' ') bytes${wanted:+, sha256 as expected}"
