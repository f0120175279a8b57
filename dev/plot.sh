#!/bin/sh
# Draws OUT/log.csv as one picture, OUT/log.png: loss, accuracy, learning rate and gradient norm by update.
#
#   sh dev/plot.sh [OUT]          needs gnuplot (apt, dnf, pacman, brew: package gnuplot)
set -u
out=${1:-out}
log=$out/log.csv
if ! command -v gnuplot >/dev/null; then
    echo "dev/plot.sh: gnuplot is not here: install the package gnuplot (on Debian gnuplot-nox)" >&2
    exit 1
fi
if ! [ -s "$log" ] || [ "$(grep -c ',train,' "$log")" = 0 ]; then
    echo "dev/plot.sh: $log: no training log here; make train writes one into out/" >&2
    exit 1
fi

# A short run shows each update, a long one medians too: the points stay, thin, behind the smoothed line.
gnuplot <<END || exit 1
set terminal pngcairo size 1280,900 font "sans,11" noenhanced
set output "$out/log.png.part"
set datafile separator ","
set multiplot layout 2,2 title "$log" font ",13"
set key top right
set grid back linecolor "#dddddd"
set xlabel "update"
train(column) = stringcolumn(3) eq "train" ? column : NaN
val(column) = stringcolumn(3) eq "val" ? column : NaN
set datafile missing NaN

set title "loss"
plot "$log" using 1:(train(\$4)) with points pointtype 7 pointsize 0.3 linecolor "#a6c8e8" notitle, \
     "$log" using 1:(train(\$4)) smooth bezier linewidth 2 linecolor "#1f6fb4" title "train", \
     "$log" using 1:(val(\$4)) with linespoints pointtype 7 pointsize 0.8 linewidth 2 linecolor "#d1541f" title "val"
set title "accuracy of scored tokens, %"
set key bottom right
plot "$log" using 1:(train(100*\$5)) with points pointtype 7 pointsize 0.3 linecolor "#a6c8e8" notitle, \
     "$log" using 1:(train(100*\$5)) smooth bezier linewidth 2 linecolor "#1f6fb4" title "train", \
     "$log" using 1:(val(100*\$5)) with linespoints pointtype 7 pointsize 0.8 linewidth 2 linecolor "#d1541f" title "val"
set key off
set title "learning rate"
set format y "%.1e"
set yrange [0:*]
plot "$log" using 1:(train(\$6)) with lines linewidth 2 linecolor "#1f6fb4"
set title "gradient norm before clipping"
set format y "%g"
set yrange [*:*]
set logscale y
plot "$log" using 1:(train(\$7)) with points pointtype 7 pointsize 0.3 linecolor "#a6c8e8", \
     "$log" using 1:(train(\$7)) smooth bezier linewidth 2 linecolor "#1f6fb4"
unset multiplot
END
mv "$out/log.png.part" "$out/log.png" && echo "$out/log.png"
