// stories.c: the offline corpus. Makes short true stories, questions about them, and checks generated text.
//
//   cc -O2 -o stories data/stories.c
//   ./stories text --seed 1 --megabytes 4 > stories.txt
//   ./stories questions --seed 1 --count 5000 > questions.jsonl
//   ./stories check sample.txt
//
// The world has 12 people, 80 things (8 colours of 10 nouns) and 8 places. A person is in one place and holds
// at most one thing; a thing is held by a person or lies in a place. A story takes two or three people,
// things and places, introduces them, lets things happen, and recalls often what is true by now. Such a
// recall can be foretold only by a reader who keeps track, which is what a model is to learn here:
//
//   One day Felix was in the forest. Grace was in the forest. There was a white hat in the park. Grace had
//   brought a blue cup. Then she gave the blue cup to Felix. As for the white hat, it was in the park.
//   Then Felix and Grace went to the cellar together. By now Grace had nothing. As for Felix, he was in
//   the cellar. The blue cup was with Felix. At last nobody had the white hat.
//
//   {"prompt": "One day Felix was ... with Felix. Question: Where is the blue cup? Answer:",
//    "completion": " In the cellar."}
//
// Every answer follows from the story. Guessing is right in 19 % with the most frequent answer of each kind,
// in 25 % with the last and in 38 % with the first person, thing or place that the story mentions.
//
// All text comes from one table, `sentences`, and all truth from one function, happens(). The writer fills
// slots at random until happens() agrees; the checker matches text against the table and asks happens() too.
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char separator[] = "<|endoftext|>", white[] = " \t\r\n";

// ---- Words --------------------------------------------------------------------------------------
// In no list is one word the beginning of another, so matching never has to choose.

enum { PEOPLE = 12, COLOURS = 8, NOUNS = 10, THINGS = COLOURS * NOUNS, PLACES = 8, THENS = 5, NOWS = 6 };

static const char *const people[PEOPLE] = { // women have even numbers, men odd ones
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Julia", "Leo", "Mary", "Tom"};
static const char *const colours[COLOURS] = {
    "red", "blue", "green", "yellow", "white", "black", "brown", "pink"};
static const char *const nouns[NOUNS] = {
    "ball", "cup", "hat", "book", "key", "box", "kite", "lamp", "doll", "bell"};
static const char *const places[PLACES] = {
    "kitchen", "garden", "park", "library", "barn", "school", "forest", "cellar"};
static const char *const pronouns[2] = {"she", "he"};
static const char *const thens[THENS] = {"", "then ", "later ", "soon ", "after that, "};
static const char *const nows[NOWS] = {"", "now ", "by now ", "in the end, ", "so ", "at last "};
enum { ENDING_NOWS = 3 }; // from here on, a `now` only begins the last sentences of a story

enum slot { PERSON, OTHER, THING, SECOND, PLACE, GOAL, HE, THEN, NOW, SLOTS };
static const struct { const char *name; int values; } slot_table[SLOTS] = {
    {"{person}", PEOPLE}, {"{other}", PEOPLE}, {"{thing}", THINGS}, {"{second}", THINGS}, {"{place}", PLACES},
    {"{goal}", PLACES}, {"{he}", 2}, {"{then}", THENS}, {"{now}", NOWS}};

// ---- Sentences ----------------------------------------------------------------------------------
// With a {person}, {place} is where that person already is and {goal} is elsewhere; {other} is someone else.

enum part { OPENING, EVENT, RECALL };
enum rule { // what each needs and changes is said in happens()
    MEET, MEET_BOTH, OWNS, LIES,
    FIND, GO, GO_BOTH, VISIT, CARRY, TAKE, FETCH, DROP, GIVE, ASK, KEEP, SWAP, WANT, WANT_HELD, WANT_FAR,
    IS_IN, BOTH_IN, HAS, HAS_NOTHING, NOBODY_HAS, THING_IN, BOTH_HAVE, ONE_HAS, STILL_WANTS, GLAD
};

static const struct sentence {
    enum part part;
    enum rule rule;
    const char *pattern; // its first letter becomes a capital
} sentences[] = {
    {OPENING, MEET, "{person} was in the {place}."},
    {OPENING, MEET, "one day {person} was in the {place}."},
    {OPENING, MEET, "{person} was waiting in the {place}."},
    {OPENING, MEET_BOTH, "{person} and {other} were in the {place}."},
    {OPENING, MEET_BOTH, "{person} met {other} in the {place}."},
    {OPENING, OWNS, "{person} had a {thing}."},
    {OPENING, OWNS, "{person} had brought a {thing}."},
    {OPENING, OWNS, "{person} was holding a {thing}."},
    {OPENING, LIES, "there was a {thing} in the {place}."},
    {OPENING, LIES, "a {thing} lay in the {place}."},
    {OPENING, LIES, "someone had left a {thing} in the {place}."},

    {EVENT, FIND, "{then}{person} found a {thing} in the {place}."},
    {EVENT, GO, "{then}{person} went to the {goal}."},
    {EVENT, GO, "{then}{person} walked to the {goal}."},
    {EVENT, GO, "{then}{person} left the {place} and went to the {goal}."},
    {EVENT, GO, "{then}{person} ran from the {place} to the {goal}."},
    {EVENT, GO_BOTH, "{then}{person} and {other} went to the {goal} together."},
    {EVENT, VISIT, "{then}{person} went to see {other} in the {goal}."},
    {EVENT, CARRY, "{then}{person} took the {thing} to the {goal}."},
    {EVENT, CARRY, "{then}{person} carried the {thing} from the {place} to the {goal}."},
    {EVENT, TAKE, "{then}{person} picked up the {thing}."},
    {EVENT, TAKE, "{then}{person} took the {thing} that lay in the {place}."},
    {EVENT, FETCH, "{then}{person} went to get the {thing} in the {goal}."},
    {EVENT, DROP, "{then}{person} dropped the {thing}."},
    {EVENT, DROP, "{then}{person} put the {thing} down in the {place}."},
    {EVENT, DROP, "{then}{person} left the {thing} in the {place}."},
    {EVENT, GIVE, "{then}{person} gave the {thing} to {other}."},
    {EVENT, GIVE, "{then}{person} gave {other} the {thing}."},
    {EVENT, GIVE, "{then}{other} took the {thing} from {person}."},
    {EVENT, ASK, "{then}{other} asked {person} for the {thing} and got it."},
    {EVENT, SWAP, "{then}{person} gave {other} the {thing} and got the {second}."},
    {EVENT, KEEP, "{then}{other} asked {person} for the {thing}, but {person} kept it."},
    {EVENT, WANT, "{person} wanted the {thing}."},
    {EVENT, WANT_HELD, "{person} wanted the {thing}, but {other} had it."},
    {EVENT, WANT_FAR, "{person} wanted the {thing}, but it was in the {goal}."},

    {RECALL, IS_IN, "{now}{person} was in the {place}."},
    {RECALL, IS_IN, "as for {person}, {he} was in the {place}."},
    {RECALL, BOTH_IN, "{now}{person} and {other} were both in the {place}."},
    {RECALL, HAS, "{now}{person} had the {thing}."},
    {RECALL, HAS, "{now}the {thing} was with {person}."},
    {RECALL, HAS, "as for {person}, {he} had the {thing}."},
    {RECALL, HAS, "as for the {thing}, {person} had it."},
    {RECALL, HAS_NOTHING, "{now}{person} had nothing."},
    {RECALL, HAS_NOTHING, "as for {person}, {he} had nothing."},
    {RECALL, NOBODY_HAS, "{now}nobody had the {thing}."},
    {RECALL, NOBODY_HAS, "as for the {thing}, nobody had it."},
    {RECALL, THING_IN, "{now}the {thing} was in the {place}."},
    {RECALL, THING_IN, "as for the {thing}, it was in the {place}."},
    {RECALL, BOTH_HAVE, "{now}{person} had the {thing}, and {other} had the {second}."},
    {RECALL, ONE_HAS, "{now}{person} had the {thing}, and {other} had nothing."},
    {RECALL, STILL_WANTS, "{now}{person} still wanted the {thing}."},
    {RECALL, GLAD, "{now}{person} was glad to have the {thing}."},
};
enum { SENTENCES = sizeof sentences / sizeof *sentences };

static char things[THINGS][16];              // "red ball" and so on
static unsigned char uses[SENTENCES][SLOTS]; // whether a pattern has a slot

// Fills the two tables above.
static void prepare(void) {
    for (int i = 0; i < THINGS; i++)
        sprintf(things[i], "%s %s", colours[i / NOUNS], nouns[i % NOUNS]);
    for (int i = 0; i < SENTENCES; i++)
        for (int slot = 0; slot < SLOTS; slot++)
            uses[i][slot] = strstr(sentences[i].pattern, slot_table[slot].name) != NULL;
}

// ---- The world ----------------------------------------------------------------------------------

enum { NONE = -1, UNKNOWN = -2 }; // UNKNOWN: the story has not named it yet

struct world {
    int at[PEOPLE];    // place of each person, or UNKNOWN
    int has[PEOPLE];   // thing that each person holds, or NONE
    int wants[PEOPLE]; // thing that each person wants, or NONE
    int with[THINGS];  // who holds each thing, NONE when it lies somewhere, or UNKNOWN
    int lies[THINGS];  // place of each thing that nobody holds
    int pronoun[2];    // whom "she" and "he" at the beginning of the next sentence mean, or NONE
};

// Empties the world: nobody and nothing has been named yet.
static void forget(struct world *world) {
    for (int i = 0; i < PEOPLE; i++) {
        world->at[i] = UNKNOWN;
        world->has[i] = world->wants[i] = NONE;
    }
    for (int i = 0; i < THINGS; i++)
        world->with[i] = world->lies[i] = UNKNOWN;
    world->pronoun[0] = world->pronoun[1] = NONE;
}

// Returns where a thing is: with its holder, or where it lies.
static int place_of(const struct world *world, int thing) {
    return world->with[thing] >= 0 ? world->at[world->with[thing]] : world->lies[thing];
}

// Takes a thing from whoever has it to a person, or to a place when the person is NONE; always possible.
static int move_thing(struct world *world, int thing, int person, int place) {
    int before = world->with[thing];
    if (before >= 0 && world->has[before] == thing)
        world->has[before] = NONE;
    if (person >= 0)
        world->has[person] = thing;
    world->with[thing] = person;
    world->lies[thing] = place;
    return 1;
}

// Tells whether a sentence is possible now and, if so, makes it true; slots that its pattern lacks are NONE.
static int happens(struct world *world, enum rule rule, const int slots[SLOTS]) {
    const int person = slots[PERSON], other = slots[OTHER], thing = slots[THING], second = slots[SECOND];
    const int place = slots[PLACE], goal = slots[GOAL];
    const int here = person >= 0 ? world->at[person] : NONE, there = other >= 0 ? world->at[other] : NONE;
    const int has = person >= 0 ? world->has[person] : NONE;
    const int other_has = other >= 0 ? world->has[other] : NONE;
    const int with = thing >= 0 ? world->with[thing] : NONE, lies = thing >= 0 ? world->lies[thing] : NONE;
    const int holds = with == person, together = here == there;
    const int new_people = rule == MEET || rule == MEET_BOTH;
    const int new_thing = rule == OWNS || rule == LIES || rule == FIND;

    if (person >= 0 && (person == other || (here == UNKNOWN) != new_people))
        return 0;
    if (other >= 0 && (there == UNKNOWN) != new_people)
        return 0;
    if (thing >= 0 && (with == UNKNOWN) != new_thing)
        return 0;
    if (here >= 0 && ((place >= 0 && place != here) || goal == here))
        return 0;

    switch (rule) { // what it needs && what it changes
    case MEET: return world->at[person] = place, 1;
    case MEET_BOTH: return world->at[person] = world->at[other] = place, 1;
    case LIES: return move_thing(world, thing, NONE, place);
    case OWNS:
    case FIND: return has == NONE && move_thing(world, thing, person, NONE);

    case GO: return world->at[person] = goal, 1;
    case GO_BOTH: return together && (world->at[person] = world->at[other] = goal, 1);
    case VISIT: return there == goal && (world->at[person] = goal, 1);
    case CARRY: return holds && (world->at[person] = goal, 1);
    case TAKE: return has == NONE && lies == here && move_thing(world, thing, person, NONE);
    case FETCH:
        return has == NONE && lies == goal && move_thing(world, thing, person, NONE) &&
               (world->at[person] = goal, 1);
    case DROP: return holds && move_thing(world, thing, NONE, here);
    case GIVE: return holds && together && other_has == NONE && move_thing(world, thing, other, NONE);
    case ASK:
        return holds && together && other_has == NONE && move_thing(world, thing, other, NONE) &&
               (world->wants[other] = thing, 1);
    case KEEP: return holds && together && (world->wants[other] = thing, 1);
    case SWAP:
        return holds && together && other_has == second && move_thing(world, thing, other, NONE) &&
               move_thing(world, second, person, NONE);
    case WANT: return !holds && world->wants[person] != thing && (world->wants[person] = thing, 1);
    case WANT_HELD: return with == other && (world->wants[person] = thing, 1);
    case WANT_FAR: return place_of(world, thing) == goal && (world->wants[person] = thing, 1);

    case IS_IN: return 1;
    case BOTH_IN: return together;
    case HAS: return holds;
    case HAS_NOTHING: return has == NONE;
    case NOBODY_HAS: return with == NONE;
    case THING_IN: return place_of(world, thing) == place;
    case BOTH_HAVE: return holds && other_has == second;
    case ONE_HAS: return holds && other_has == NONE;
    case STILL_WANTS: return world->wants[person] == thing && !holds;
    case GLAD: return world->wants[person] == thing && holds;
    }
    return 0;
}

// Notes whom a pronoun can mean next: the first person of this sentence, if alone of that gender in it.
static void note_pronoun(struct world *world, const char *pattern, const int slots[SLOTS]) {
    const char *person = strstr(pattern, "{person}"), *other = strstr(pattern, "{other}");
    world->pronoun[0] = world->pronoun[1] = NONE;
    if (!person || (other && slots[PERSON] % 2 == slots[OTHER] % 2))
        return;
    int first = slots[other && other < person ? OTHER : PERSON];
    world->pronoun[first % 2] = first;
}

// ---- Patterns: one spelling for writing and for matching ----------------------------------------

// Returns the spelling of one value of a slot.
static const char *spell(enum slot slot, int value) {
    return slot <= OTHER ? people[value] : slot <= SECOND ? things[value] : slot <= GOAL ? places[value]
         : slot == HE ? pronouns[value] : slot == THEN ? thens[value] : nows[value];
}

// Returns the slot whose name stands at the beginning of `pattern`, or SLOTS where a plain letter stands.
static enum slot slot_at(const char *pattern) {
    int slot = *pattern == '{' ? 0 : SLOTS;
    while (slot < SLOTS && strncmp(pattern, slot_table[slot].name, strlen(slot_table[slot].name)) != 0)
        slot++;
    return (enum slot)slot;
}

// Tells whether a pronoun may stand for the person at `here`: at the start, perhaps after "then" or "now".
static int may_be_pronoun(enum slot slot, const char *pattern, const char *here) {
    enum slot first = slot_at(pattern);
    return slot <= OTHER && (here == pattern || ((first == THEN || first == NOW) && here[-1] == '}'));
}

// Writes a filled pattern to `out` and returns its end; with a world, says "she" or "he" where it is clear.
static char *write_sentence(char *out, const char *pattern, const int *slots, const struct world *world) {
    char *start = out;
    for (const char *p = pattern; *p;) {
        enum slot slot = slot_at(p);
        if (slot == SLOTS) {
            *out++ = *p++;
            continue;
        }
        int value = slots[slot];
        const char *word = spell(slot, value);
        if (world && may_be_pronoun(slot, pattern, p) && world->pronoun[value % 2] == value)
            word = pronouns[value % 2];
        size_t length = strlen(word);
        memcpy(out, word, length);
        out += length;
        p += strlen(slot_table[slot].name);
    }
    *start = (char)toupper((unsigned char)*start);
    *out = 0;
    return out;
}

// Returns the length of `word` if `text` goes on with it at `at`, else 0; the first letter must be a capital.
static size_t goes_on(const char *text, size_t at, const char *word) {
    size_t length = strlen(word);
    int first = at == 0 ? toupper((unsigned char)word[0]) : word[0];
    return length > 0 && text[at] == first && strncmp(text + at + 1, word + 1, length - 1) == 0 ? length : 0;
}

// Tells whether `text` is this pattern, and fills the slots; those that the pattern lacks become NONE.
static int match_sentence(const char *text, const char *pattern, int *slots, const struct world *world) {
    size_t at = 0, length;
    for (int i = 0; i < SLOTS; i++)
        slots[i] = NONE;
    for (const char *p = pattern; *p; at += length) {
        enum slot slot = slot_at(p);
        int value = 0;
        if (slot == SLOTS) {
            if (!(length = goes_on(text, at, (const char[]){*p++, 0})))
                return 0;
            continue;
        }
        length = 0;
        for (int i = 0; i < slot_table[slot].values && !length; i++)
            if ((length = goes_on(text, at, spell(slot, i))))
                value = i;
        for (int i = 0; i < 2 && !length && may_be_pronoun(slot, pattern, p); i++)
            if (world->pronoun[i] >= 0 && (length = goes_on(text, at, pronouns[i])))
                value = world->pronoun[i];
        if (!length && slot != THEN && slot != NOW) // only these two may be empty
            return 0;
        if ((slots[slot] >= 0 && slots[slot] != value) || (slot == HE && value != slots[PERSON] % 2))
            return 0;
        slots[slot] = value;
        p += strlen(slot_table[slot].name);
    }
    return text[at] == 0;
}

// ---- Writing stories ----------------------------------------------------------------------------

struct random { uint64_t seed, draws; };

// Mixes 64 bits so that neighbours have nothing in common (the last steps of splitmix64).
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Returns a number from 0 to limit - 1: the next draw of this seed, the same on every machine.
static int draw(struct random *random, int limit) {
    return (int)((mix(random->seed + ++random->draws * 0x9E3779B97F4A7C15u) >> 33) % (uint64_t)limit);
}

// Chooses `count` different numbers from 0 to limit - 1.
static void choose(struct random *random, int *chosen, int count, int limit) {
    for (int i = 0; i < count; i++) {
        chosen[i] = draw(random, limit);
        for (int j = 0; j < i; j++)
            if (chosen[i] == chosen[j]) {
                i--; // draw this one again
                break;
            }
    }
}

enum { CAST = 3, STORY_BYTES = 4096 };
struct story {
    char text[STORY_BYTES], *end;
    struct world world;
    int cast[SLOTS][CAST], size[SLOTS]; // the values from which each slot is filled
    int last[SLOTS];                    // slots of the last sentence
};

// Adds one possible sentence of a part to a story; `ending` makes it begin as last sentences do.
static void add_sentence(struct story *story, struct random *random, enum part part, int ending) {
    for (;;) {
        int sentence = draw(random, SENTENCES), slots[SLOTS];
        const char *pattern = sentences[sentence].pattern;
        for (int attempt = 0; attempt < 30 && sentences[sentence].part == part; attempt++) {
            for (int slot = 0; slot < SLOTS; slot++)
                slots[slot] = !uses[sentence][slot] ? NONE
                            : slot <= GOAL ? story->cast[slot][draw(random, story->size[slot])]
                            : slot == HE ? slots[PERSON] % 2
                            : slot == THEN ? draw(random, THENS)
                            : ending ? ENDING_NOWS + draw(random, NOWS - ENDING_NOWS)
                            : draw(random, ENDING_NOWS);
            enum slot topic = uses[sentence][THING] ? THING : PERSON;
            if (part == RECALL && slots[topic] == story->last[topic]) // too easy: it has just been spoken of
                continue;
            if (!happens(&story->world, sentences[sentence].rule, slots))
                continue;
            if (story->end > story->text)
                *story->end++ = ' ';
            story->end = write_sentence(story->end, pattern, slots, draw(random, 2) ? &story->world : NULL);
            note_pronoun(&story->world, pattern, slots);
            memcpy(story->last, slots, sizeof slots);
            return;
        }
    }
}

// Writes a story: an opening, events with recalls among them and, with `ending`, recalls at the end.
static void write_story(struct story *story, struct random *random, int ending) {
    static const enum slot pairs[3][2] = {{PERSON, OTHER}, {THING, SECOND}, {PLACE, GOAL}};
    int colour[CAST];
    for (int i = 0; i < 3; i++) {
        int *cast = story->cast[pairs[i][0]], size = 2 + (draw(random, 3) == 0);
        choose(random, cast, size, pairs[i][0] == THING ? NOUNS : slot_table[pairs[i][0]].values);
        if (pairs[i][0] == THING) { // no noun and no colour twice
            choose(random, colour, size, COLOURS);
            for (int j = 0; j < size; j++)
                cast[j] += NOUNS * colour[j];
        }
        memcpy(story->cast[pairs[i][1]], cast, sizeof story->cast[0]);
        story->size[pairs[i][0]] = story->size[pairs[i][1]] = size;
    }
    memset(story->last, NONE, sizeof story->last);
    forget(&story->world);
    story->end = story->text;

    int later = story->size[THING] == 3 ? draw(random, 2) : 0; // whether one thing may be found in the middle
    for (int ready = 0; !ready;) {
        add_sentence(story, random, OPENING, 0);
        int new_people = 0, new_things = 0;
        for (int i = 0; i < story->size[PERSON]; i++)
            new_people += story->world.at[story->cast[PERSON][i]] == UNKNOWN;
        for (int i = 0; i < story->size[THING]; i++)
            new_things += story->world.with[story->cast[THING][i]] == UNKNOWN;
        ready = new_people == 0 && new_things <= later;
    }
    for (int more = 5 + draw(random, 5); more > 0; more--)
        add_sentence(story, random, draw(random, 2) ? RECALL : EVENT, 0);
    for (int more = ending ? 2 + draw(random, 3) : 0; more > 0; more--)
        add_sentence(story, random, RECALL, 1);
}

// ---- Questions ----------------------------------------------------------------------------------

// Finds the first and the last value of a slot that a text mentions.
static void mentions(const char *text, enum slot slot, int *first, int *last) {
    const char *first_place = NULL, *last_place = NULL;
    for (int i = 0; i < slot_table[slot].values; i++)
        for (const char *p = text; (p = strstr(p, spell(slot, i))); p++) {
            if (!first_place || p < first_place)
                first_place = p, *first = i;
            if (!last_place || p > last_place)
                last_place = p, *last = i;
        }
}

// Writes a question as a line of JSON (nothing needs escaping). What sort of answer it has (nobody or
// nothing, the first or the last one mentioned, or another) is drawn first, then stories until one fits,
// so that no simple guess is often right.
static void write_question(struct random *random) {
    enum { WHO_HAS, WHAT_HAS, WHERE_THING, WHERE_PERSON, KINDS } kind = draw(random, KINDS);
    static const struct { const char *question, *answer, *none; enum slot slot; } texts[KINDS] = {
        {"who has the {thing}?", "{person}.", "nobody.", PERSON},
        {"what does {person} have?", "the {thing}.", "nothing.", THING},
        {"where is the {thing}?", "in the {place}.", "", PLACE},
        {"where is {person}?", "in the {place}.", "", PLACE}};
    enum { NO_ONE, FIRST, LAST, ANOTHER, SORTS } wanted = draw(random, SORTS), sort;
    if (kind >= WHERE_THING && wanted == NO_ONE)
        wanted = ANOTHER;
    struct story story;
    const struct world *world = &story.world;
    int slots[SLOTS], first = NONE, last = NONE;
    do {
        write_story(&story, random, 0);
        int person = slots[PERSON] = story.cast[PERSON][draw(random, story.size[PERSON])];
        int thing = slots[THING] = story.cast[THING][draw(random, story.size[THING])];
        slots[texts[kind].slot] = kind == WHO_HAS ? world->with[thing] : kind == WHAT_HAS ? world->has[person]
                                : kind == WHERE_THING ? place_of(world, thing) : world->at[person];
        mentions(story.text, texts[kind].slot, &first, &last);
        int answer = slots[texts[kind].slot];
        sort = answer == NONE ? NO_ONE : answer == last ? LAST : answer == first ? FIRST : ANOTHER;
    } while (slots[texts[kind].slot] == UNKNOWN || sort != wanted);

    char question[80], answer[80];
    write_sentence(question, texts[kind].question, slots, NULL);
    write_sentence(answer, sort == NO_ONE ? texts[kind].none : texts[kind].answer, slots, NULL);
    printf("{\"prompt\": \"%s Question: %s Answer:\", ", story.text, question);
    printf("\"completion\": \" %s\"}\n", answer);
}

// ---- Checking text ------------------------------------------------------------------------------

struct counts { long documents, sentences, grammatical, consistent; };

// Checks one document: a sentence ends with . ? or !, and what follows the last of these was cut off.
static void check_document(char *text, struct counts *counts) {
    struct world world;
    forget(&world);
    text += strspn(text, white);
    counts->documents += *text != 0;
    for (char *end; *(end = text + strcspn(text, ".?!")); text = end + 1 + strspn(end + 1, white)) {
        int grammatical = NONE, consistent = 0, slots[SLOTS], matched[SLOTS];
        char next = end[1];
        end[1] = 0;
        for (int i = 0; i < SENTENCES && !consistent; i++)
            if (match_sentence(text, sentences[i].pattern, slots, &world)) {
                grammatical = i;
                memcpy(matched, slots, sizeof slots);
                consistent = happens(&world, sentences[i].rule, slots);
            }
        if (grammatical >= 0)
            note_pronoun(&world, sentences[grammatical].pattern, matched);
        else
            world.pronoun[0] = world.pronoun[1] = NONE;
        counts->sentences++;
        counts->grammatical += grammatical >= 0;
        counts->consistent += consistent;
        end[1] = next;
    }
}

// Reads a stream to its end as one string, or returns NULL; a zero byte becomes a 1, which is no word either.
static char *read_all(FILE *in) {
    size_t size = 0, room = 1 << 20;
    char *text = malloc(room);
    while (text && (size += fread(text + size, 1, room - size - 1, in)) == room - 1) {
        char *more = realloc(text, room *= 2);
        if (!more)
            free(text);
        text = more;
    }
    for (size_t i = 0; text && i < size; i++)
        text[i] = text[i] ? text[i] : 1;
    if (text)
        text[size] = 0;
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
    printf("documents %ld\nsentences %ld, grammatical %ld (%.1f %%), consistent %ld (%.1f %%)\n",
           counts.documents, counts.sentences, counts.grammatical, percent * (double)counts.grammatical,
           counts.consistent, percent * (double)counts.consistent);
    free(text);
    if (in != stdin)
        fclose(in);
    return 0;
}

// ---- Command line -------------------------------------------------------------------------------

static const char usage[] =
    "usage: stories text --seed N --megabytes X     stories, separated by <|endoftext|> lines\n"
    "       stories questions --seed N --count N    prompts and completions, one JSON object a line\n"
    "       stories check [FILE]                    shares of grammatical and of true sentences\n";

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
    if (whole && value != (double)(uint64_t)value)
        misused("not a whole number: ", text);
    return value;
}

int main(int argc, char **argv) {
    static const struct option options[] = {{"seed", required_argument, NULL, 's'},
                                            {"megabytes", required_argument, NULL, 'm'},
                                            {"count", required_argument, NULL, 'c'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    double seed = NONE, megabytes = NONE, count = NONE;
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (option) {
        case 's': seed = number(optarg, 9007199254740992.0, 1); break;
        case 'm': megabytes = number(optarg, 1e6, 0); break;
        case 'c': count = number(optarg, 1e9, 1); break;
        case 'h': fputs(usage, stdout); return fflush(stdout) != 0;
        default: misused("unknown option, or its value is missing: ", argv[optind - 1]);
        }
    const char *command = optind < argc ? argv[optind++] : "", *file = optind < argc ? argv[optind++] : NULL;
    int text = strcmp(command, "text") == 0, questions = strcmp(command, "questions") == 0;
    int checking = strcmp(command, "check") == 0;
    if (!text && !questions && !checking)
        misused("say text, questions or check, not: ", command);
    if (optind < argc || (file && !checking))
        misused("one word too many: ", argv[argc - 1]);
    if (text && (seed < 0 || megabytes < 0 || count >= 0))
        misused("text wants --seed N --megabytes X", "");
    if (questions && (seed < 0 || count < 0 || megabytes >= 0))
        misused("questions wants --seed N --count N", "");
    if (checking && (seed >= 0 || count >= 0 || megabytes >= 0))
        misused("check takes no options but a file", "");

    prepare();
    struct random random = {checking ? 0 : mix(2 * (uint64_t)seed + (uint64_t)questions), 0};
    struct story story;
    if (checking && check(file) != 0)
        return 1;
    for (double left = megabytes * 1e6; text && left > 0 && !ferror(stdout);) {
        write_story(&story, &random, 1);
        left -= printf("%s\n%s\n", story.text, separator);
    }
    for (; questions && count > 0 && !ferror(stdout); count--)
        write_question(&random);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "stories: cannot write: %s\n", strerror(errno));
        return 1;
    }
    return 0;
}
