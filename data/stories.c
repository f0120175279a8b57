// stories.c: the offline corpus. Makes short stories of a village, questions about it, and checks generated text.
//
//   cc -O2 -o stories data/stories.c
//   ./stories text --seed 1 --megabytes 4 > stories.txt
//   ./stories questions --seed 1 --count 4000 > questions.jsonl
//   ./stories questions --seed 2 --count 500 --held-out > held_out.jsonl
//   ./stories check sample.txt
//
// Of each of the 16 villagers six things are true, in every story and with every seed: where they live, what
// their work is, which animal they keep, the colour of their coat, what they like to eat, what they play. These
// 96 facts are what a model can learn by heart:
//
//   One morning Grace met Leo at the bridge. Grace has a blue coat. She keeps a goat and likes plums. Then the two
//   went to the river together. Leo, who works as a smith, lives in the tower. ...
//
//   {"prompt": "Question: Which animal does Grace keep? Answer:", "completion": " goat"}
//
// Questions come in two parts that share no fact: a fifth of the facts is asked only with --held-out. Who answers
// those has learned the facts from the stories, and from the other questions only how to answer. A guess is right in one
// of 10 to 12.
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char separator[] = "<|endoftext|>", white[] = " \t\r\n";

// ---- Words and facts ----------------------------------------------------------------------------
// In no list is one word the beginning of another, so matching never has to choose.

enum { PEOPLE = 16, PLACES = 8, MORNINGS = 6, KINDS = 6, MOST_VALUES = 12, HELD_OUT = 5 };

static const char *const people[PEOPLE] = { // women have even numbers, men odd ones
    "Anna",  "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry",
    "Julia", "Leo", "Mary",  "Tom",   "Nora", "Adam",  "Rosa",  "Bruno"};
static const char *const places[PLACES] = {"market", "river",   "bridge", "well",
                                           "school", "harbour", "forest", "lake"};
static const char *const mornings[MORNINGS] = {"one morning", "one day",   "today",
                                               "last summer", "on Sunday", "at noon"};
static const char *const pronouns[2] = {"she", "he"};

// A kind of fact: its values, how a sentence says it behind a name, and how it is asked.
static const struct kind {
    int count;
    const char *values[MOST_VALUES], *says[4], *asks[3];
} kinds[KINDS] = {
    {12,
     {"mill", "tower", "castle", "barn", "lighthouse", "cottage", "palace", "tent", "cave", "hut",
      "farmhouse", "inn"},
     {"lives in the {}", "has a room in the {}", "sleeps in the {}", "is at home in the {}"},
     {"Where does {} live?", "Where is {} at home?", "Where does {} sleep?"}},
    {12,
     {"baker", "miller", "smith", "tailor", "sailor", "doctor", "painter", "gardener", "teacher", "farmer",
      "potter", "weaver"},
     {"is a {}", "works as a {}", "has always been a {}", "earns money as a {}"},
     {"What is {}'s work?", "What does {} work as?", "How does {} earn money?"}},
    {12,
     {"cat", "dog", "parrot", "goat", "rabbit", "horse", "turtle", "goose", "hamster", "donkey", "fox",
      "lamb"},
     {"keeps a {}", "has a tame {}", "feeds a {} every day", "takes care of a {}"},
     {"Which animal does {} keep?", "Which animal does {} feed?", "Which animal does {} take care of?"}},
    {10,
     {"red", "blue", "green", "yellow", "white", "black", "brown", "pink", "grey", "purple"},
     {"has a {} coat", "wears a {} coat", "owns a coat that is {}", "came in a {} coat"},
     {"Which colour is {}'s coat?", "Which colour does {} wear?", "In which colour did {} come?"}},
    {12,
     {"plums", "soup", "bread", "cheese", "honey", "pears", "cake", "fish", "rice", "beans", "nuts",
      "cherries"},
     {"likes {}", "likes to eat {}", "eats {} every evening", "is fond of {}"},
     {"What does {} like to eat?", "What does {} eat every evening?", "What is {} fond of?"}},
    {10,
     {"flute", "drum", "violin", "harp", "horn", "guitar", "trumpet", "lute", "whistle", "piano"},
     {"plays the {}", "can play the {}", "practises the {} at night", "learned the {} as a child"},
     {"What does {} play?", "What can {} play?", "What did {} learn as a child?"}}};

// Mixes 64 bits so that neighbours have nothing in common (the last steps of splitmix64).
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// The truth: which value a person has, and whether the fact is asked only with --held-out.
static int value_of(int person, int kind) {
    return (int)(mix((uint64_t)(person * KINDS + kind + 1) * 0x9E3779B97F4A7C15u) %
                 (uint64_t)kinds[kind].count);
}
static int is_held_out(int person, int kind) { return (person + kind) % HELD_OUT == 0; }

// ---- Sentences ----------------------------------------------------------------------------------
// {a} and {b}: two people; {he}: she or he, who was named last; {f} and {g}: facts about {a}; others: any word.

static const char *const openings[] = {"{morning} {a} met {b} at the {place}.",
                                       "{morning} {a} and {b} met at the {place}.",
                                       "{morning} {a} went to see {b}."};
static const char *const sentences[] = {"{a} {f}.",
                                        "{a} {f}.",
                                        "{a} {f} and {g}.",
                                        "{a}, who {f}, {g}.",
                                        "everybody knows that {a} {f}.",
                                        "as for {a}, {he} {f}.",
                                        "{b} said that {a} {f}.",
                                        "{he} {f}.",
                                        "{he} {f} and {g}.",
                                        "{he} also {f}.",
                                        "then {a} and {b} went to the {place} together."};
enum { OPENINGS = sizeof openings / sizeof *openings, SENTENCES = sizeof sentences / sizeof *sentences };

struct random {
    uint64_t seed, draws;
};

// Returns a number from 0 to limit - 1: the next draw of this seed, the same on every machine.
static int draw(struct random *random, int limit) {
    return (int)((mix(random->seed + ++random->draws * 0x9E3779B97F4A7C15u) >> 33) % (uint64_t)limit);
}

// Writes a pattern with `word` for its {}; returns the end of what is written.
static char *fill(char *out, const char *pattern, const char *word) {
    size_t before = strcspn(pattern, "{");
    return out +
           sprintf(out, "%.*s%s%s", (int)before, pattern, word, pattern[before] ? pattern + before + 2 : "");
}

// Writes a sentence about person a (and b); the first letter becomes a capital.
static char *write_sentence(char *out, const char *pattern, struct random *random, int a, int b) {
    char *start = out;
    int first = draw(random, KINDS), second = (first + 1 + draw(random, KINDS - 1)) % KINDS;
    for (const char *p = pattern; *p;) {
        size_t length = strcspn(p + 1, "}") + 2;
        if (*p != '{') {
            *out++ = *p++;
            continue;
        }
        int kind = p[1] == 'f' ? first : second;
        if (p[1] == 'f' || p[1] == 'g')
            out = fill(out, kinds[kind].says[draw(random, 4)], kinds[kind].values[value_of(a, kind)]);
        else
            out += sprintf(out, "%s",
                           p[1] == 'a'   ? people[a]
                           : p[1] == 'b' ? people[b]
                           : p[1] == 'h' ? pronouns[a % 2]
                           : p[1] == 'p' ? places[draw(random, PLACES)]
                                         : mornings[draw(random, MORNINGS)]);
        p += length;
    }
    *start = (char)toupper((unsigned char)*start);
    return out;
}

// Prints a story of one person, who meets another. A pronoun means whom the sentence before was about.
static size_t write_story(struct random *random) {
    char text[4096], *end = text;
    int cast[2] = {draw(random, PEOPLE), 0}, topic = -1;
    cast[1] = (cast[0] + 1 + draw(random, PEOPLE - 1)) % PEOPLE;
    end = write_sentence(end, openings[draw(random, OPENINGS)], random, cast[0], cast[1]);
    for (int more = 3 + draw(random, 4); more > 0;) {
        const char *pattern = sentences[draw(random, SENTENCES)];
        int about = draw(random, 6) == 0; // mostly the first one
        if (strncmp(pattern, "{he}", 4) == 0) {
            if (topic < 0) continue;
            about = topic;
        }
        *end++ = ' ';
        end = write_sentence(end, pattern, random, cast[about], cast[1 - about]);
        topic = strstr(pattern, "{b}") ? -1 : about;
        more--;
    }
    return (size_t)printf("%.*s\n%s\n", (int)(end - text), text, separator);
}

// Prints a question about a fact of one part as a line of JSON (nothing needs escaping).
static void write_question(struct random *random, int held_out) {
    int person, kind;
    char question[100];
    do person = draw(random, PEOPLE), kind = draw(random, KINDS);
    while (is_held_out(person, kind) != held_out);
    fill(question, kinds[kind].asks[draw(random, 3)], people[person]);
    printf("{\"prompt\": \"Question: %s Answer:\", \"completion\": \" %s\"}\n", question,
           kinds[kind].values[value_of(person, kind)]);
}

// ---- Checking text ------------------------------------------------------------------------------

struct counts {
    long documents, sentences, grammatical, consistent;
};
struct reading {
    int a, b, topic, is_true;
}; // whom a sentence is about, and whether its facts are true

// Returns how many letters of `text` are this word, in any case for the first one when `initial`; 0 if others.
static size_t goes_on(const char *text, const char *word, int initial) {
    size_t length = 0;
    while (word[length] && (text[length] == word[length] ||
                            (initial && length == 0 && tolower((unsigned char)*text) == tolower(*word))))
        length++;
    return word[length] ? 0 : length;
}

// Returns the number of the word in the list with which `text` goes on, or -1; *length gets its length.
static int word_at(const char *text, const char *const *words, int count, int initial, size_t *length) {
    for (int i = 0; i < count; i++)
        if ((*length = goes_on(text, words[i], initial))) return i;
    return -1;
}

// Matches a pattern at the beginning of `text`, up to its end; 1 if it does, and `reading` says what it says.
static int match(const char *text, const char *pattern, const char *start, struct reading *reading) {
    size_t length = 0;
    int initial = text == start, word;
    if (*pattern == 0) return *text == 0;
    if (*pattern != '{')
        return goes_on(text, (const char[]){*pattern, 0}, initial) &&
               match(text + 1, pattern + 1, start, reading);
    const char *rest = strchr(pattern, '}') + 1;
    switch (pattern[1]) {
    case 'a':
    case 'b':
        if ((word = word_at(text, people, PEOPLE, initial, &length)) < 0) return 0;
        *(pattern[1] == 'a' ? &reading->a : &reading->b) = word;
        return reading->a != reading->b && match(text + length, rest, start, reading);
    case 'h': // at the beginning of a sentence it means whom the one before was about
        if (initial) reading->a = reading->topic;
        return reading->a >= 0 && (length = goes_on(text, pronouns[reading->a % 2], initial)) &&
               match(text + length, rest, start, reading);
    case 'p':
        return word_at(text, places, PLACES, initial, &length) >= 0 &&
               match(text + length, rest, start, reading);
    case 'm':
        return word_at(text, mornings, MORNINGS, initial, &length) >= 0 &&
               match(text + length, rest, start, reading);
    }
    for (int kind = 0; kind < KINDS; kind++) // a fact, said in one of four ways
        for (int i = 0; i < 4; i++) {
            const char *says = kinds[kind].says[i], *gap = strchr(says, '{'), *at = text + (gap - says);
            if (strncmp(text, says, (size_t)(gap - says)) != 0 ||
                (word = word_at(at, kinds[kind].values, kinds[kind].count, 0, &length)) < 0 ||
                strncmp(at + length, gap + 2, strlen(gap + 2)) != 0)
                continue;
            struct reading before = *reading;
            reading->is_true = reading->is_true && reading->a >= 0 && word == value_of(reading->a, kind);
            if (match(at + length + strlen(gap + 2), rest, start, reading)) return 1;
            *reading = before;
        }
    return 0;
}

// Checks one document: a sentence ends with . ? or !, and what follows the last of these was cut off.
static void check_document(char *text, struct counts *counts) {
    int topic = -1;
    text += strspn(text, white);
    counts->documents += *text != 0;
    for (char *end; *(end = text + strcspn(text, ".?!")); text = end + 1 + strspn(end + 1, white)) {
        const char *found = NULL;
        struct reading reading = {0};
        char next = end[1];
        end[1] = 0;
        for (int i = 0; i < OPENINGS + SENTENCES && !(found && reading.is_true); i++) {
            const char *pattern = i < OPENINGS ? openings[i] : sentences[i - OPENINGS];
            struct reading attempt = {-1, -2, topic, 1};
            if (match(text, pattern, text, &attempt)) found = pattern, reading = attempt;
        }
        topic = found && !strstr(found, "{b}") ? reading.a : -1;
        counts->sentences++;
        counts->grammatical += found != NULL;
        counts->consistent += found && reading.is_true;
        end[1] = next;
    }
}

// Reads a stream to its end as one string, or returns NULL; a zero byte becomes a 1, which is no word either.
static char *read_all(FILE *in) {
    size_t size = 0, room = 1 << 20;
    char *text = malloc(room);
    while (text && (size += fread(text + size, 1, room - size - 1, in)) == room - 1) {
        char *more = realloc(text, room *= 2);
        if (!more) free(text);
        text = more;
    }
    for (size_t i = 0; text && i < size; i++) text[i] = text[i] ? text[i] : 1;
    if (text) text[size] = 0;
    return text;
}

// Runs `stories check`; a file name of NULL or - is standard input. Returns the exit status.
static int check(const char *name) {
    FILE *in = name && strcmp(name, "-") != 0 ? fopen(name, "rb") : stdin;
    char *text = in ? read_all(in) : NULL;
    if (!text || ferror(in)) {
        fprintf(stderr, "stories: cannot read %s: %s\n", name ? name : "standard input", strerror(errno));
        free(text);
        return 1;
    }
    struct counts counts = {0, 0, 0, 0};
    for (char *document = text, *next; document; document = next) {
        if ((next = strstr(document, separator))) {
            *next = 0;
            next += strlen(separator);
        }
        check_document(document, &counts);
    }
    double percent = counts.sentences ? 100.0 / (double)counts.sentences : 0;
    printf("documents %ld\nsentences %ld, grammatical %ld (%.1f %%), true in the village %ld (%.1f %%)\n",
           counts.documents, counts.sentences, counts.grammatical, percent * (double)counts.grammatical,
           counts.consistent, percent * (double)counts.consistent);
    free(text);
    if (in != stdin) fclose(in);
    return 0;
}

// ---- Command line -------------------------------------------------------------------------------

static const char usage[] =
    "usage: stories text --seed N --megabytes X                   stories, separated by <|endoftext|> lines\n"
    "       stories questions --seed N --count N [--held-out]     prompts and completions, one JSON object a "
    "line\n"
    "       stories check [FILE]                                  shares of grammatical and of true "
    "sentences\n";

// Says in one line what is wrong with the command line and stops with status 2.
static void misused(const char *what, const char *which) {
    fprintf(stderr, "stories: %s%s (see stories --help)\n", what, which);
    exit(2);
}

// Returns the number from 0 to `largest` that `text` is, whole unless it is the megabytes, or stops.
static double number(const char *text, double largest, int whole) {
    char *end;
    double value = strtod(text, &end);
    if (!isdigit((unsigned char)*text) || *end || !(value >= 0 && value <= largest))
        misused("not a number that can be used: ", text);
    if (whole && value != (double)(uint64_t)value) misused("not a whole number: ", text);
    return value;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"seed", required_argument, NULL, 's'},  {"megabytes", required_argument, NULL, 'm'},
        {"count", required_argument, NULL, 'c'}, {"held-out", no_argument, NULL, 'o'},
        {"help", no_argument, NULL, 'h'},        {NULL, 0, NULL, 0}};
    double seed = -1, megabytes = -1, count = -1;
    int held_out = 0;
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) switch (option) {
        case 's': seed = number(optarg, 9007199254740992.0, 1); break;
        case 'm': megabytes = number(optarg, 1e6, 0); break;
        case 'c': count = number(optarg, 1e9, 1); break;
        case 'o': held_out = 1; break;
        case 'h': fputs(usage, stdout); return fflush(stdout) != 0;
        default: misused("unknown option, or its value is missing: ", argv[optind - 1]);
        }
    const char *command = optind < argc ? argv[optind++] : "", *file = optind < argc ? argv[optind++] : NULL;
    int text = strcmp(command, "text") == 0, questions = strcmp(command, "questions") == 0;
    int checking = strcmp(command, "check") == 0;
    if (!text && !questions && !checking) misused("say text, questions or check, not: ", command);
    if (optind < argc || (file && !checking)) misused("one word too many: ", argv[argc - 1]);
    if (text && (seed < 0 || megabytes < 0 || count >= 0 || held_out))
        misused("text wants --seed N --megabytes X", "");
    if (questions && (seed < 0 || count < 0 || megabytes >= 0))
        misused("questions wants --seed N --count N", "");
    if (checking && (seed >= 0 || count >= 0 || megabytes >= 0 || held_out))
        misused("check takes no options but a file", "");

    struct random random = {checking ? 0 : mix(2 * (uint64_t)seed + (uint64_t)questions), 0};
    if (checking && check(file) != 0) return 1;
    for (double left = megabytes * 1e6; text && left > 0 && !ferror(stdout);)
        left -= (double)write_story(&random);
    for (; questions && count > 0 && !ferror(stdout); count--) write_question(&random, held_out);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "stories: cannot write: %s\n", strerror(errno));
        return 1;
    }
    return 0;
}
