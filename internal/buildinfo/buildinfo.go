// SPDX-License-Identifier: Apache-2.0

// Package buildinfo says which signalbox this is.
package buildinfo

import (
	"runtime"
	"runtime/debug"
	"strings"

	"k8s.io/apimachinery/pkg/version"
)

// Version is that of a release; main sets it, which has it from the linker.
var Version = "devel"

// Kubernetes is the release of kube-proxy that signalbox behaves like.
const Kubernetes = "v1.37.2"

// Release is Kubernetes with signalbox's own version as the build metadata.
func Release() string { return Kubernetes + "+signalbox." + Version }

// Info is what the components of Kubernetes tell of their build, for a release of
// Kubernetes such as v1.36.3 or v1.36.3+k3s1.
func Info(release string) version.Info {
	major, rest, _ := strings.Cut(strings.TrimPrefix(release, "v"), ".")
	minor, _, _ := strings.Cut(rest, ".")
	return version.Info{
		Major: major, Minor: minor, GitVersion: release, GitCommit: Revision(),
		GoVersion: runtime.Version(), Compiler: runtime.Compiler, Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
}

// Revision is the commit that the program was built from, and empty where the
// build did not record it.
func Revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return ""
}
