// Package buildinfo says which signalbox this is.
package buildinfo

import "runtime/debug"

// Version is that of a release; main sets it, which has it from the linker.
var Version = "devel"

// Kubernetes is the release of kube-proxy that signalbox behaves like.
const Kubernetes = "v1.36.3"

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
