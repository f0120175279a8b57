#!/bin/sh
# Repairs links into train_gpt2.c, [name](train_gpt2.c#L123) or [`name`](...), by their names: each gets the
# line where that function, type, table or row of an enum begins (dev/outline.awk).
#
#   sh dev/links.sh FILE...
set -u
cd "$(dirname "$0")/.." || exit 1
for file in "$@"; do
    awk -f dev/outline.awk train_gpt2.c | awk -v file="$file" '
        NR == FNR { if ($1 != "prose" && !($2 in line)) line[$2] = $3; next }
        {
            done = ""
            while (match($0, /\[`?[A-Za-z_0-9]+`?\]\(train_gpt2\.c#L[0-9]+\)/)) {
                link = name = substr($0, RSTART, RLENGTH)
                sub(/\].*/, "", name)
                gsub(/[^A-Za-z_0-9]/, "", name)
                if (name in line) {
                    sub(/#L[0-9]+/, "#L" line[name], link)
                } else {
                    print file ":" FNR ": train_gpt2.c has no " name >"/dev/stderr"
                    missing = 1
                }
                done = done substr($0, 1, RSTART - 1) link
                $0 = substr($0, RSTART + RLENGTH)
            }
            print done $0
        }
        END { exit missing }' - "$file" >"$file.tmp" || { rm -f "$file.tmp"; exit 1; }
    cmp -s "$file.tmp" "$file" && rm "$file.tmp" || mv "$file.tmp" "$file"
done
