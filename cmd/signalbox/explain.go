// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"signalbox/config"
	"signalbox/daemon"
	"signalbox/explain"
)

// exitStatus ends the program with an exit code and without a message.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func explainCommand() *cobra.Command {
	var flags config.Flags
	var from string
	var output format
	var nodeAddresses []string
	var kernel bool
	cmd := &cobra.Command{
		Use:   "explain HOST:PORT[/PROTO] | NAMESPACE/SERVICE[:PORT]",
		Short: "Explain what this node does with a new connection to a Service",
		Long: `Explains which Service has an address, which policy applies to a client, and
which endpoints get new connections. Each endpoint that is left out has a reason.
The last lines say what becomes of a new connection. HOST is an IP address, or
the DNS name of a Service such as web.default.svc, which stands for its cluster
IPs.

It asks the signalbox that serves this node, through a local socket. That needs
root. It also compares what the kernel has for the Service with what it wrote. With
--source, --kubeconfig or --master, or if no signalbox answers, it reads the objects
itself, for the node that --hostname-override names. That needs no privileges. The
first line then says that no signalbox was asked, or that none answers.

  signalbox explain 10.96.0.10:80 --from 10.244.1.12
  signalbox explain 192.0.2.1:30053/udp
  signalbox explain default/web:http -o json

The exit code is about the worst connection: 0 if it is served, 2 if it is
refused, 3 if it is dropped, 4 if signalbox does not serve the Service, if no
signalbox answers, if the kernel refuses or lacks its rules, or if it has others,
such as those of another service proxy. 1 says that the question has no answer.`,
		Args: oneQuestion,
		RunE: func(cmd *cobra.Command, args []string) error {
			q, err := explain.ParseQuestion(args[0], from)
			if err != nil {
				return err
			}
			answer, err := answerFor(cmd.Context(), &flags, q, from, kernel, nodeAddresses)
			if err != nil {
				return err
			}
			if err := write(cmd.OutOrStdout(), output, answer); err != nil {
				return err
			}
			if code := answer.Verdict.ExitCode(); code != 0 {
				return exitStatus(code)
			}
			return nil
		},
	}
	addFlags(cmd, &flags)
	cmd.Flags().StringVar(&from, "from", "", "IP address of the client; without it, the answer is about Pods and processes of this node, and about all other clients")
	cmd.Flags().StringSliceVar(&nodeAddresses, "node-addresses", nil, "addresses of the node's interfaces, if no running signalbox is asked; those of the Node object are known")
	cmd.Flags().BoolVar(&kernel, "kernel", true, "have the running signalbox compare the Service with the kernel; changes wait meanwhile")
	addOutput(cmd, &output, outputHelp)
	return cmd
}

func oneQuestion(cmd *cobra.Command, args []string) error {
	if len(args) == 1 {
		return nil
	}
	return fmt.Errorf("%s takes one question, HOST:PORT or NAMESPACE/SERVICE, and here are %d (%[1]s --help has examples)", cmd.CommandPath(), len(args))
}

// answerFor asks the running daemon, or reads the objects.
func answerFor(ctx context.Context, flags *config.Flags, q explain.Question, from string, kernel bool, nodeAddresses []string) (*explain.Answer, error) {
	cfg, err := flags.Config()
	if err != nil {
		return nil, err
	}
	var noDaemon error
	if cfg.SourceDir == "" && cfg.Kubeconfig == "" && cfg.Master == "" {
		answer := &explain.Answer{}
		err := explain.Ask(ctx, cfg.RunDir, "/explain", url.Values{"target": {q.Target}, "from": {from}, "kernel": {strconv.FormatBool(kernel)}}, answer)
		if !errors.Is(err, explain.ErrNoDaemon) {
			return answer, err
		}
		noDaemon = err
	}
	addrs, err := parseAddrs(nodeAddresses)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	answer, err := daemon.Explain(ctx, cfg, addrs, q, noDaemon)
	if err != nil {
		return nil, errors.Join(noDaemon, err)
	}
	return answer, nil
}

// readTimeout bounds the wait for an API server.
const readTimeout = 30 * time.Second

func statusCommand() *cobra.Command {
	var runDir string
	var output format
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Print the state of the signalbox that serves this node",
		Long: `Prints mode, IP families, counts and last syncs of the signalbox that serves this
node, what it does not serve and since when, problems of the node and of objects,
and requests to the API server that fail. It asks through a local socket and needs
root.

The exit code is 0 if everything is served as its objects ask, 2 if something is
not, and 1 if no signalbox answers.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var status explain.Status
			if err := explain.Ask(cmd.Context(), runDir, "/status", nil, &status); err != nil {
				return err
			}
			if err := write(cmd.OutOrStdout(), output, &status); err != nil {
				return err
			}
			if !status.Well() {
				return exitStatus(2)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", config.DefaultRunDir, "directory of the local socket")
	addOutput(cmd, &output, outputHelp)
	return cmd
}

func diffCommand() *cobra.Command {
	var runDir string
	var output format
	cmd := &cobra.Command{
		Use:   "diff",
		Short: "Print how the kernel differs from what signalbox wrote",
		Long: `Has the signalbox that serves this node read back what the kernel has, and prints
how that differs from what it wrote. A line that begins with "-" is missing in the
kernel. A line that begins with "+" is in the kernel and not signalbox's. Other lines
say in words what differs, and which changes are not written yet. Nothing is written.
It asks through a local socket and needs root. It compares each rule.

The exit code is 0 if nothing differs, 1 if something does, and 2 if the kernel was
not compared.`,
		Args: func(cmd *cobra.Command, args []string) error { return notCompared(cmd, noArguments(cmd, args)) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			var diff explain.Diff
			err := explain.Ask(cmd.Context(), runDir, "/diff", nil, &diff)
			if err == nil {
				err = write(cmd.OutOrStdout(), output, &diff)
			}
			if err != nil {
				return notCompared(cmd, err)
			}
			if code := diff.ExitCode(); code != 0 {
				return exitStatus(code)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", config.DefaultRunDir, "directory of the local socket")
	cmd.SetFlagErrorFunc(notCompared)
	addOutput(cmd, &output, outputHelp)
	return cmd
}

// notCompared prints why diff has not compared anything. Exit code 1 would say that
// something differs.
func notCompared(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	cmd.PrintErrln("signalbox:", err)
	return exitStatus(2)
}

// format is the value of --output: text if it is empty.
type format string

const inJSON format = "json"

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "string" }

// Set implements pflag.Value.
func (f *format) Set(value string) error {
	if value != "" && format(value) != inJSON {
		return errors.New("leave it out, or take json")
	}
	*f = format(value)
	return nil
}

func addOutput(cmd *cobra.Command, output *format, help string) {
	cmd.Flags().VarP(output, "output", "o", help)
}

// outputHelp is the help of --output for one answer.
const outputHelp = "format of the output: json, or empty for text"

// write prints an answer in the format that is asked for.
func write(w io.Writer, output format, answer interface{ Print(io.Writer) }) error {
	if output == inJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(answer)
	}
	answer.Print(w)
	return nil
}
