// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"signalbox/config"
	"signalbox/internal/buildinfo"
)

// version is set when a release is linked.
var version = "devel"

func init() { buildinfo.Version = version }

func versionCommand() *cobra.Command {
	var output format
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of signalbox",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text := "signalbox " + versionText()
			if output == inJSON {
				text = versionJSON()
			}
			fmt.Fprintln(cmd.OutOrStdout(), text)
			return nil
		},
	}
	addOutput(cmd, &output, outputHelp)
	return cmd
}

func versionText() string {
	revision := buildinfo.Revision()
	if revision != "" {
		revision = " " + revision
	}
	return fmt.Sprintf("%s%s %s %s/%s", version, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// versionJSON has the release of kube-proxy that signalbox behaves like in the form
// in which the components of Kubernetes tell of theirs.
func versionJSON() string {
	text, err := json.MarshalIndent(map[string]any{
		"version": version, "revision": buildinfo.Revision(), "kubernetes": buildinfo.Info(buildinfo.Release()),
	}, "", "  ")
	if err != nil {
		panic(err) // strings alone
	}
	return string(text)
}

// versionFor is what --version prints. Inventories know the form of kube-proxy, which
// ends the release of a distribution with a plus sign and more, as in v1.36.3+k3s1.
func versionFor(asked config.Version, program string) string {
	switch {
	case asked == config.VersionRaw:
		return fmt.Sprintf("%#v", buildinfo.Info(buildinfo.Release()))
	case program == asKubeProxy:
		return "Kubernetes " + buildinfo.Release()
	}
	return "signalbox version " + versionText()
}
