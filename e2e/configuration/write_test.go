// SPDX-License-Identifier: Apache-2.0

package configuration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

// TestWritten compares files that both write, byte by byte.
func TestWritten(t *testing.T) {
	kubeProxy, signalbox := build(t)
	for _, in := range []input{
		{args: "--proxy-mode=nftables --masquerade-all --feature-gates=AllBeta=true", file: none},
		{args: "--proxy-mode=ipvs --ipvs-scheduler=sh --nodeport-addresses=10.0.0.0/8 --cluster-cidr=10.0.0.0/8,fd00::/8", file: none},
		{args: "", file: none, otherwise: map[string]string{"mode: iptables": "mode: auto"}},
		{},
		{file: "mode: \"\"\nmode: ipvs\nunknown: field\nlogging: {vmodule: [{filePattern: a, verbosity: 3}]}", args: "--vmodule=b=4"},
	} {
		t.Run(in.name(), func(t *testing.T) {
			t.Parallel()
			in.compareWritten(t, kubeProxy, signalbox)
		})
	}
}

// compareWritten wants signalbox to write what kube-proxy does.
func (in *input) compareWritten(t *testing.T, kubeProxy, signalbox string) {
	t.Helper()
	args := in.prepare(t, t.TempDir())
	theirs, refusal := written(t, kubeProxy, args)
	ours, ourRefusal := written(t, signalbox, args)
	if (refusal != nil) != in.refused || (ourRefusal != nil) != in.refused {
		t.Fatalf("refused should be %v: kube-proxy: %v; signalbox: %v", in.refused, refusal, ourRefusal)
	}
	want, err := in.replaceLines(theirs)
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(want, ours); diff != "" {
		t.Errorf("signalbox does not write what kube-proxy does (-want +got):\n%s", diff)
	}
}

// written is what a program writes, or what it says when it refuses.
func written(t *testing.T, program string, args []string) (file string, refusal error) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out.yaml")
	args = append(slices.Clone(args), "--write-config-to="+out)
	// A program that takes the words for its daemon's would run for ever.
	ctx, cancel := context.WithTimeout(t.Context(), hangTimeout)
	defer cancel()
	said, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("%s %q did not end:\n%s", program, args, said)
	}
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, said)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatalf("%s %q wrote nothing: %v\n%s", program, args, err, said)
	}
	return string(text), nil
}
