// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"signalbox/cmd/lab/internal/demo"
	"signalbox/modes"

	"signalbox/proxier/plan"
)

func demoCommand() *cobra.Command {
	var modeNames, families []string
	var signalbox string
	var cfg demo.Config
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show every mode at work in a lab on this machine, with real connections",
		Long: `Builds a lab of network namespaces: two nodes, Pods and clients outside. Runs
signalbox on one node in one mode after the other. Prints which Pods answered
real connections, which client addresses they saw, how soon a changed manifest
takes effect, and how much time a Service adds to connect(2). It needs root and
leaves the machine as it was. It fails if a result is wrong.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cfg.Modes, err = demoModes(modeNames); err != nil {
				return err
			}
			if cfg.Families, err = familiesNamed(families); err != nil {
				return err
			}
			if cfg.Binary, err = findSignalbox(signalbox); err != nil {
				return err
			}
			return demo.Run(cmd.Context(), cfg, cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	addSignalboxFlag(fs, &signalbox)
	fs.StringSliceVar(&modeNames, "mode", nil, "show only these modes (default: all modes)")
	fs.StringSliceVar(&families, "family", nil, "show only IPv4 or IPv6 (default: both)")
	fs.IntVar(&cfg.Services, "services", demo.DefaultServices, "number of additional Services, which get no connections")
	fs.IntVar(&cfg.Changes, "changes", demo.DefaultChanges, "number of changes to a manifest")
	return cmd
}

func demoModes(names []string) ([]demo.Mode, error) {
	chosen := modes.All
	if len(names) > 0 {
		chosen = nil
	}
	for _, name := range names {
		m, err := modes.Named(name)
		if err != nil {
			return nil, fmt.Errorf("--mode: %w", err)
		}
		chosen = append(chosen, m)
	}
	shown := make([]demo.Mode, len(chosen))
	for i, m := range chosen {
		shown[i] = demo.Mode{Name: m.Name(), Supported: m.Supported}
	}
	return shown, nil
}

func familiesNamed(names []string) ([]plan.Family, error) {
	if len(names) == 0 {
		return plan.Families, nil
	}
	var chosen []plan.Family
	for _, name := range names {
		i := slices.IndexFunc(plan.Families, func(f plan.Family) bool { return strings.EqualFold(f.String(), name) })
		if i < 0 {
			return nil, fmt.Errorf("--family=%s: neither IPv4 nor IPv6", name)
		}
		if f := plan.Families[i]; !slices.Contains(chosen, f) {
			chosen = append(chosen, f)
		}
	}
	return chosen, nil
}
