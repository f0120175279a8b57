# What stands where in a C file; test_gpt2.c and dev/links.sh read this.
#
#   awk -f dev/outline.awk train_gpt2.c
#
# A line "KIND NAME FIRST LAST" for each function, type, table and row of an enum: the lines it takes. And for
# each part of the file "prose NAME LINES PROSE": how many lines it has, and how many of them carry prose. These
# are comments with at least one word, or code with a comment of at least four words behind it.

function words(text) {
    gsub(/[^A-Za-z]+/, " ", text)
    gsub(/(^| )[A-Za-z]( |$)/, " ", text) # letters and formulas are no words
    return split(text, list, " ")
}

function end_part() {
    if (part) print "prose", part, lines, prose
    lines = prose = 0
}

function rows(text) { # of an enum, on one line
    sub(/\/\/.*/, "", text)
    sub(/^[^{]*\{/, "", text)
    sub(/\}.*/, "", text)
    count = split(text, list, ",")
    for (i = 1; i <= count; i++)
        if (match(list[i], /[A-Za-z_][A-Za-z_0-9]*/)) print "row", substr(list[i], RSTART, RLENGTH), NR, NR
}

function name_before(text, what) {
    match(text, "[A-Za-z_][A-Za-z_0-9]*" what)
    text = substr(text, RSTART, RLENGTH)
    sub(what, "", text)
    return text
}

/^\/\/ PART / {
    end_part()
    part = $3
    sub(/\.$/, "", part)
}
part {
    lines++
    if (match($0, /^ *\/\/ /)) prose += words($0) >= 1 && !/clang-format o/
    else if (match($0, / \/\/ /)) prose += words(substr($0, RSTART)) >= 4
}

/^(typedef )?enum/ { in_enum = 1 }
in_enum && !/^#/ { rows($0) }
/^(typedef )?(enum|struct|union).*\{/ || /^static const .*\{/ && !/\(/ { # a type or a table begins
    first = NR
    if (/^static/ && /\[.*=/) print "table", name_before($0, "\\["), NR, NR
    tag = /^struct/ ? $2 : ""
}
/^\};/ && tag { print "type", tag, first, NR }
/^\}.*;/ || /^typedef (enum|struct).*\{.*\}/ {
    in_enum = 0
    tag = ""
    if (match($0, /\} [A-Za-z_0-9]+;/)) print "type", name_before($0, ";"), first, NR
}
/^enum.*\}/ { in_enum = 0 }
/^\}.*\[.*= *\{/ { print "table", name_before($0, "\\["), first, NR }

# Functions: a head from column 1, over as many lines as it takes, that ends in a brace.
!head && /^[a-z].*\(/ && !/^(typedef|enum|struct)/ {
    head = $0
    begin = NR
    gsub(/__attribute__\(\(.*\)\)/, "", head)
}
head && !body && /;( *\/\/.*)?$/ { head = "" }
head && !body && /[{}]$/ { body = 1 }
head && body && (/^\}/ || (NR == begin && /\}$/)) {
    print "function", name_before(head, "\\("), begin, NR
    head = body = ""
}
END { end_part() }
