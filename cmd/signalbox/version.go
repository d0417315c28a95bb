package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"signalbox/internal/buildinfo"
)

// version is set when a release is linked.
var version = "devel"

func init() { buildinfo.Version = version }

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Say which signalbox this is",
		Args:  noArguments,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "signalbox %s\n", versionText())
		},
	}
}

func versionText() string {
	revision := buildinfo.Revision()
	if revision != "" {
		revision = " " + revision
	}
	return fmt.Sprintf("%s%s %s %s/%s", version, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
