# gnuplot -e "letter='a'; work='build/recipe'" dev/recipe/plot.gp: draws one experiment of dev/recipe/run.sh
set terminal svg size 760,380 font 'Helvetica,13' background rgb 'white'
set output sprintf('%s/%s.svg', work, letter)
set grid ytics lc rgb '#dddddd'
set border 3
set tics nomirror
if (letter eq 'f') {
    set datafile separator ','
    set xlabel 'update'
    set ylabel 'loss'
    set logscale y
    set key center right
    file = sprintf('%s/runs/f-overfit-1.csv', work)
    set format y '%g'
    plot '< grep train '.file using 1:4 with lines lw 2 lc rgb '#0b6e99' title 'the one batch', \
         '< grep val '.file using 1:4 with linespoints lw 2 pt 7 ps 0.6 lc rgb '#c4442f' title 'held-out questions'
} else {
    data = sprintf('%s/%s.dat', work, letter)
    set ylabel 'exact match on held-out questions, %'
    set yrange [-3:103]
    set offsets 0.6, 0.6, 0, 0
    set xtics rotate by 25 right
    unset key
    if (letter eq 'e' || letter eq 'h') {
        set y2label 'loss on the stories'
        set y2range [0:*]
        set y2tics
        set border 11
        set key outside top horizontal
        plot data using 0:2:3:4:xtic(1) with yerrorbars pt 7 lw 2 lc rgb '#0b6e99' title 'exact match', \
             data using 0:5 axes x1y2 with points pt 5 lc rgb '#c4442f' title 'loss on the stories (right)'
    } else {
        plot data using 0:2:3:4:xtic(1) with yerrorbars pt 7 lw 2 lc rgb '#0b6e99'
    }
}
