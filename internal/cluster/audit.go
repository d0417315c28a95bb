// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// auditPolicy records what ProxyUser asks for, and nothing of others.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
rules:
- level: Metadata
  users: ["` + ProxyUser + `"]
- level: None
`

// Request is one request of ProxyUser that the API server answered.
type Request struct {
	// Verb is as RBAC knows it: "list", "watch", "get".
	Verb string
	// Resource has its group after a dot, where there is one:
	// "endpointslices.discovery.k8s.io".
	Resource string
	// URI is the path and the query.
	URI string
	// Code is the HTTP status: 403 for what ProxyUser may not do.
	Code int
}

// Requests returns what ProxyUser has asked of the API server since the
// cluster was made, in the order of the answers. A watch counts from its first
// byte.
func (c *Cluster) Requests() ([]Request, error) {
	text, err := os.ReadFile(filepath.Join(c.opts.Dir, "audit.log"))
	if err != nil {
		return nil, err
	}
	var requests []Request
	for line := range strings.Lines(string(text)) {
		if !strings.HasSuffix(line, "\n") {
			break // still being written
		}
		var event struct {
			Stage, Verb, RequestURI string
			ObjectRef               struct{ Resource, APIGroup string }
			ResponseStatus          struct{ Code int }
		}
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			return nil, fmt.Errorf("audit log: %w", err)
		}
		// A watch is never complete while it is of use.
		stage := "ResponseComplete"
		if event.Verb == "watch" && event.ResponseStatus.Code < 400 {
			stage = "ResponseStarted"
		}
		if event.Stage != stage {
			continue
		}
		resource := strings.Trim(event.ObjectRef.Resource+"."+event.ObjectRef.APIGroup, ".")
		requests = append(requests, Request{event.Verb, resource, event.RequestURI, event.ResponseStatus.Code})
	}
	return requests, nil
}
