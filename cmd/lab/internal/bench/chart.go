// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"image/color"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// charts show a figure against the number of Services, one line for each proxy.
var charts = []struct {
	file, title, key, axis string
	scale                  float64
}{
	{"cold-start.svg", "Cold start until every virtual IP answers", "cold_wall", "seconds", 1},
	{"move.svg", "An endpoint moves: API write to first packet, median", "move_p50", "milliseconds", 1e3},
	{"move-processor.svg", "Processor time for one moved endpoint", "move_cpu", "milliseconds", 1e3},
	{"memory.svg", "Memory of the process, settled", "memory_settled", "MiB", 1.0 / (1 << 20)},
}

const distributionFile = "move-distribution.svg"

// ink and palette have about the same contrast on a light and on a dark page.
var (
	ink     = color.NRGBA{R: 0x74, G: 0x7a, B: 0x82, A: 0xff}
	faint   = color.NRGBA{R: 0x74, G: 0x7a, B: 0x82, A: 0x40}
	palette = []color.NRGBA{
		{R: 0x2f, G: 0x81, B: 0xf7, A: 0xff}, {R: 0xd9, G: 0x73, B: 0x0d, A: 0xff}, {R: 0x2e, G: 0xa0, B: 0x43, A: 0xff},
		{R: 0xa3, G: 0x71, B: 0xf7, A: 0xff}, {R: 0xe5, G: 0x53, B: 0x4b, A: 0xff}, {R: 0x1b, G: 0x9a, B: 0xaa, A: 0xff},
	}
)

func chartNames() []string {
	var names []string
	for _, c := range charts {
		names = append(names, c.file)
	}
	return append(names, distributionFile)
}

// writeCharts writes the charts as SVG.
func (r *Report) writeCharts(dir string) error {
	if len(r.Sizes) == 0 {
		return nil
	}
	for _, c := range charts {
		p := newPlot(c.title, "Services", c.axis)
		for i := range r.Sizes[0].Proxies {
			var points plotter.XYs
			for j := range r.Sizes {
				if v, has := median(r.Sizes[j].Proxies[i].Figures[c.key]); has && v > 0 {
					points = append(points, plotter.XY{X: float64(r.Sizes[j].Services), Y: v * c.scale})
				}
			}
			if err := addLine(p, i, r.Sizes[0].Proxies[i].name(), points); err != nil {
				return err
			}
		}
		if err := save(p, dir, c.file); err != nil {
			return err
		}
	}
	return r.writeDistribution(dir)
}

// writeDistribution shows, for the largest size, which share of moves took at most how long.
func (r *Report) writeDistribution(dir string) error {
	size := &r.Sizes[len(r.Sizes)-1]
	p := newPlot("An endpoint moves, "+size.String(), "milliseconds", "share of moves")
	p.Y.Scale, p.Y.Tick.Marker = plot.LinearScale{}, plot.DefaultTicks{}
	for i := range size.Proxies {
		moves := slices.Sorted(slices.Values(size.Proxies[i].Moves))
		points := make(plotter.XYs, len(moves))
		for j, v := range moves {
			points[j] = plotter.XY{X: v * 1e3, Y: float64(j+1) / float64(len(moves))}
		}
		if err := addLine(p, i, size.Proxies[i].name(), points); err != nil {
			return err
		}
	}
	return save(p, dir, distributionFile)
}

func newPlot(title, x, y string) *plot.Plot {
	p := plot.New()
	p.BackgroundColor = nil // the page's
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.TextStyle.Color, p.Legend.TextStyle.Color = ink, ink
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.Color, a.Label.TextStyle.Color, a.Tick.Label.Color, a.Tick.Color = ink, ink, ink, ink
		a.Scale, a.Tick.Marker, a.AutoRescale = plot.LogScale{}, plot.LogTicks{Prec: -1}, true
	}
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = faint, faint
	p.Add(grid)
	p.Legend.Top, p.Legend.Left, p.Legend.XOffs = true, true, vg.Points(6)
	return p
}

// addLine draws one proxy; a proxy without values has no line.
func addLine(p *plot.Plot, i int, name string, points plotter.XYs) error {
	if len(points) == 0 {
		return nil
	}
	line, dots, err := plotter.NewLinePoints(points)
	if err != nil {
		return err
	}
	line.Color, line.Width = palette[i%len(palette)], vg.Points(2)
	dots.Color, dots.Shape, dots.Radius = line.Color, draw.CircleGlyph{}, vg.Points(3)
	p.Add(line, dots)
	p.Legend.Add(name, line, dots)
	return nil
}

// save leaves room around the values: a log axis with one value has no width.
func save(p *plot.Plot, dir, file string) error {
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		if a.Min > a.Max { // no value
			a.Min, a.Max = 1, 10
		}
		if _, log := a.Scale.(plot.LogScale); log {
			a.Min, a.Max = a.Min/1.5, a.Max*1.5
		}
	}
	return p.Save(18*vg.Centimeter, 10*vg.Centimeter, filepath.Join(dir, file))
}
