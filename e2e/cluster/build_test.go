// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"os/exec"
	"strings"
	"testing"

	"signalbox/internal/cluster"
)

// The proxy that signalbox is compared with must be the release that the
// documentation names.
func TestKubeProxyRelease(t *testing.T) {
	bin, err := cluster.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(bin.KubeProxy, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.TrimSpace(string(out)), "Kubernetes "+cluster.KubeVersion; got != want {
		t.Errorf("built %q, want %q", got, want)
	}
}
