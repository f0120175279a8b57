# Draws log.csv files of runs, or one find-rate.csv. dev/plot.sh calls it and says what ranges the columns have:
#   gnuplot -e VARIABLES -c dev/plot.gp png|svg PICTURE FILE...
set terminal pngcairo size 1280,900 font "sans,11" noenhanced
if (ARG1 eq "svg") { set terminal svg size 1280,900 font "sans,13" noenhanced background "white" }
set output ARG2
set format y "%g"
set datafile separator comma
set datafile columnheaders
set datafile missing NaN # not a gap in a line
set grid back linetype 1 linecolor rgb "#dddddd"
n = ARGC - 2
array colours[6] = ["#1f6fb4", "#d1541f", "#3a8a3a", "#8e44ad", "#b8860b", "#555555"]
colour(i) = colours[(i - 1) % 6 + 1]

# An axis that fits the values from a to b. Where the largest is more than thrice the smallest, it is in logarithms, with
# the marks 1, 2, 5, 10 and so on; over more than three powers of ten the powers alone.
marks(a, b) = b < 1000 * a ? "1 2 5" : "1"
log_axis = 'set logscale y; set yrange [a * (a / b) ** 0.04 : b * (b / a) ** 0.04]; unset ytics; set ytics (1); ' . \
           'do for [power=-7:9] { do for [mark in marks(a, b)] { set ytics add (mark * 10. ** power) } }'
plain_axis = 'unset logscale y; set yrange [a - margin : b + margin]; set ytics autofreq'
fit = 'if (a > 0 && b > 3 * a) { eval log_axis } else { margin = b > a ? 0.04 * (b - a) : 1; eval plain_axis }'

floor_value(x) = x < 1e-6 ? 1e-6 : x
if (ARGV[3][strlen(ARGV[3]) - 12:] eq "find-rate.csv") {
    a = low_loss; b = high_loss
    eval fit
    set title ARGV[3]
    set logscale x
    set xlabel "learning rate"
    set ylabel "loss"
    set format x "%.0e"
    if (best / 10 >= low_learning_rate) {
        set arrow from suggested, graph 0 to suggested, graph 1 nohead dashtype 2 linewidth 2 linecolor rgb colour(2)
        set label sprintf(" suggested: %.1g", suggested) at suggested, graph 0.04 textcolor rgb colour(2)
    }
    plot ARGV[3] using "learning_rate":(floor_value(column("loss"))) with linespoints pointtype 7 pointsize 0.4 \
        linewidth 2 linecolor rgb colour(1) notitle
    exit
}

# Each update is a point; the line is the mean of neighbours, at most 150 groups of them in a long run.
train(name) = stringcolumn("split") eq "train" ? column(name) : NaN
val(name) = stringcolumn("split") eq "val" ? column(name) : NaN
group(i) = int(word(counts, i) / 150) + 1
place(i) = floor((column("step") - 1) / group(i)) * group(i) + 0.5 * (group(i) + 1)
# A single run has a colour and a name for each kind of line; several runs have one each.
name(i, kind) = n == 1 ? kind : kind eq "training" ? ARGV[i + 2][:strlen(ARGV[i + 2]) - 8] : ""
hue(i, kind) = colour(n == 1 ? kind : i)
set key tmargin center horizontal

points = n > 1 ? '' : 'ARGV[3] using "step":(y(train(c))) with points pointtype 7 pointsize 0.3 ' . \
                      'linecolor rgb "#a6c8e8" notitle, '
means = 'for [i=1:n] ARGV[i + 2] using (place(i)):(y(train(c))) smooth unique linewidth (n == 1 ? 2 : 1) ' . \
        'linecolor rgb hue(i, 1) title name(i, "training")'
held_out = with_val eq '' ? '' : ', for [i in with_val] ARGV[i + 2] using "step":(y(val(c))) with linespoints ' . \
           'pointtype 7 pointsize 0.8 linewidth 2 linecolor rgb hue(i, 2) title name(i, "validation")'
exact = with_exact eq '' ? '' : ', for [i in with_exact] ARGV[i + 2] using "step":(y(val("exact_match"))) ' . \
        'with linespoints pointtype 9 pointsize 0.9 linewidth 2 linecolor rgb hue(i, 3) title name(i, "exact match")'

kinds = with_val eq "" ? "" : "; circles: validation"
kinds = kinds . (with_exact eq "" ? "" : "; triangles: exact match")
set multiplot layout 2,2 title (n == 1 ? ARGV[3] : "lines: training" . kinds) . "\n" font ",13"
set xlabel "update"
set xrange [0 : high_step]
set title "loss"
y(x) = floor_value(x)
c = "loss"
a = low_loss; b = high_loss
eval fit
eval 'plot ' . points . means . held_out

set title exact eq '' ? "accuracy of scored tokens, %" : "accuracy of scored tokens, and exact match, %"
y(x) = 100 * x
c = "accuracy"
a = exact eq '' || low_accuracy < low_exact_match ? low_accuracy : low_exact_match
b = exact eq '' || high_accuracy > high_exact_match ? high_accuracy : high_exact_match
b = b > a ? b : a + 1
margin = 0.04 * (b - a)
eval plain_axis
eval 'plot ' . points . means . held_out . exact

set title "learning rate"
unset key
y(x) = x
c = "learning_rate"
unset logscale y
set yrange [0 : 1.05 * (high_learning_rate > 0 ? high_learning_rate : 1)]
set ytics autofreq
set format y "%.1e"
eval 'plot ' . means

set title "gradient norm before clipping"
set format y "%g"
y(x) = floor_value(x)
c = "grad_norm"
a = low_grad_norm; b = high_grad_norm
eval fit
eval 'plot ' . points . means
unset multiplot
