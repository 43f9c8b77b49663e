{{/*
The container's environment, as a list. Every name is a setting of zspire (docs/configuration.md) and is there once: what
proxyMetadata and env say wins over the chart, and env over proxyMetadata.
*/}}
{{- define "zspire.environment" -}}
{{- $namespace := include "zspire.shared" (list . "istioNamespace") | default "istio-system" }}
{{- $revision := ternary "" (printf "-%s" .Values.revision) (empty .Values.revision) }}
{{- $istiod := printf "istiod%s.%s.svc:15012" $revision $namespace }}
{{- $all := dict "XDS_ADDRESS" (include "zspire.shared" (list . "xdsAddress") | default $istiod) }}
{{- $_ := set $all "ISTIO_META_CLUSTER_ID" (include "zspire.clusterName" .) }}
{{- $_ := set $all "RUST_LOG" .Values.logLevel }}
{{- $_ := set $all "TERMINATION_GRACE_PERIOD_SECONDS" (.Values.terminationGracePeriodSeconds | toString) }}
{{- if eq (include "zspire.shared" (list . "logAsJson")) "true" }}{{ $_ := set $all "LOG_FORMAT" "json" }}{{ end }}
{{- with include "zspire.shared" (list . "network") }}{{ $_ := set $all "NETWORK" . }}{{ end }}
{{- with .Values.trustDomain }}{{ $_ := set $all "TRUST_DOMAIN" . }}{{ end }}
{{- if .Values.peerCaCrl.enabled }}
{{- $_ := set $all "CRL_PATH" "/var/run/secrets/istio-crl/ca-crl.pem" }}
{{- $_ := set $all "CRL_UNKNOWN_STATUS" .Values.peerCaCrl.unknownStatus }}
{{- end }}
{{- if eq .Values.identitySource "istio-ca" }}
{{- $_ := set $all "CA_ADDRESS" (include "zspire.shared" (list . "caAddress") | default $istiod) }}
{{- else }}
{{- $all = merge $all (include "zspire.environmentOfSpire" . | fromYaml) }}
{{- end }}
{{- $own := omit .Values.env "ENABLE_CLUSTER_TRUST_BUNDLE_API" }}
{{- range $name, $value := merge (deepCopy $own) .Values.meshConfig.defaultConfig.proxyMetadata }}
{{- $_ := set $all $name ($value | toString) }}
{{- end }}
{{- range $name, $path := include "zspire.environmentOfPod" . | fromYaml }}
{{- if not (hasKey $all $name) }}
- name: {{ $name }}
  valueFrom: {{ $path | toJson }}
{{- end }}
{{- end }}
{{- range $name, $value := $all }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "zspire.environmentOfSpire" -}}
{{- $spire := .Values.spire }}
IDENTITY_SOURCE: {{ .Values.identitySource }}
{{- if include "zspire.workloadApi" . }}
SPIFFE_ENDPOINT_SOCKET: unix:///run/spire/workload-api/{{ $spire.workloadApi.socket }}
{{- end }}
{{- if eq .Values.identitySource "spire-broker" }}
SPIFFE_BROKER_SOCKET: {{ $spire.broker.address | default (printf "unix:///run/spire/broker/%s" $spire.broker.socket) }}
{{- else }}
SPIRE_ADMIN_ENDPOINT_SOCKET: unix:///run/spire/admin/{{ $spire.admin.socket }}
{{- end }}
{{- with $spire.reference }}
SPIFFE_REFERENCE: {{ . }}
{{- end }}
{{- with $spire.agentId }}
SPIRE_AGENT_ID: {{ . | quote }}
{{- end }}
{{- with $spire.idTemplate }}
SPIFFE_ID_TEMPLATE: {{ . | quote }}
{{- end }}
{{- with $spire.hint }}
SPIFFE_HINT: {{ . | quote }}
{{- end }}
{{- if $spire.acceptOtherId }}
SPIFFE_ACCEPT_OTHER_ID: "true"
{{- end }}
{{- if $spire.unattestedSelectors }}
SPIRE_UNATTESTED_SELECTORS: "true"
{{- end }}
{{- end }}

{{/* What only the pod knows of itself. */}}
{{- define "zspire.environmentOfPod" -}}
POD_NAME: { fieldRef: { fieldPath: metadata.name } }
POD_NAMESPACE: { fieldRef: { fieldPath: metadata.namespace } }
NODE_NAME: { fieldRef: { fieldPath: spec.nodeName } }
INSTANCE_IP: { fieldRef: { fieldPath: status.podIP } }
SERVICE_ACCOUNT: { fieldRef: { fieldPath: spec.serviceAccountName } }
{{- if (.Values.resources.limits).cpu }}
ZTUNNEL_RESOURCE_CPU_LIMIT: { resourceFieldRef: { resource: limits.cpu, divisor: "1" } }
{{- end }}
{{- if (.Values.resources.requests).cpu }}
ZTUNNEL_RESOURCE_CPU_REQUEST: { resourceFieldRef: { resource: requests.cpu, divisor: "1" } }
{{- end }}
{{- end }}
