// Package bench measures service proxies side by side. Each proxy runs on node1 of a lab
// of its own and follows the same real API server. The proxies take turns, so that all of
// them meet the same machine. Results are ratios of medians over the rounds, with their
// spread.
//
// The files follow a run: bench.go takes sizes, rounds and proxies; objects.go makes
// Services and changes them; trial.go measures one proxy once; usage.go reads what its
// processes use; floor.go measures what no proxy can avoid; results.go sums up; report.go
// and chart.go write it down.
package bench
