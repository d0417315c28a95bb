// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"

	"github.com/spf13/cobra"

	"signalbox/config"
	"signalbox/conntrack"
	"signalbox/explain"
)

func traceCommand() *cobra.Command {
	var runDir string
	var output format
	var limit int
	cmd := &cobra.Command{
		Use:   "trace NAMESPACE/SERVICE[:PORT] | HOST:PORT[/PROTO]",
		Short: "Print the connections of a Service on this node while they live",
		Long: `Prints the connections of a Service from the kernel's connection tracking: those
that are open, and then each new one, its answer and its end, until Ctrl-C. A line
has the client, the address that it connects to, and the endpoint that the kernel
has chosen. "as ADDRESS" follows the client if the endpoint sees another source.

  10:42:04.120  new       tcp   10.244.1.12:4000 -> 10.96.0.10:80 -> 10.244.1.5:8080

A connection that is refused or dropped is not tracked, and not shown: signalbox
explain says why. It asks the signalbox of this node for the Service's addresses,
through a local socket, and needs root.`,
		Args: oneQuestion,
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := explain.ParseQuestion(args[0], ""); err != nil {
				return err
			}
			if limit < 1 {
				return fmt.Errorf("--limit=%d: give a number of at least 1", limit)
			}
			ask := func(ctx context.Context) (*explain.Frontends, error) {
				f := &explain.Frontends{}
				return f, explain.Ask(ctx, runDir, "/frontends", url.Values{"target": {args[0]}}, f)
			}
			t := explain.Trace{Ask: ask, Follow: followKernel, Flows: conntrack.List, Limit: limit, Print: linePrinter(cmd, output)}
			err := t.Run(cmd.Context())
			if errors.Is(err, explain.ErrNoDaemon) {
				return fmt.Errorf("%w; start it, or follow an address without it: conntrack -E --orig-dst ADDRESS", err)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", config.DefaultRunDir, "directory of the local socket")
	cmd.Flags().IntVar(&limit, "limit", 200, "lines a second; the number of other events is printed")
	addOutput(cmd, &output, "format of the output: json for one object a line, or empty for text")
	return cmd
}

// followKernel opens the events of this network namespace.
func followKernel() (explain.EventSource, error) { return conntrack.Follow() }

// linePrinter prints lines in the format that is asked for.
func linePrinter(cmd *cobra.Command, output format) func(explain.TraceLine) {
	if output == inJSON {
		lines := json.NewEncoder(cmd.OutOrStdout())
		return func(l explain.TraceLine) { _ = lines.Encode(l) }
	}
	return func(l explain.TraceLine) { l.PrintText(cmd.OutOrStdout()) }
}
